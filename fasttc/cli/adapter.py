"""``fasttc adapter``: what fine-tuning changed, as sparse features beside the base's MLPs."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import Run, load_model, parse_ids, plot_option, table, verb
from fasttc.cli._data import data_options
from fasttc.cli._training import costs, training_options


@click.group("adapter")
def command() -> None:
    """Transcoder adapters between a base model and its fine-tuned descendant."""


@command.command("train")
@click.argument("target")
@click.option("--base", required=True, help="The model that TARGET came from.")
@data_options()
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the adapters."
)
@click.option("--features", "n_features", default=1024, show_default=True, help="Of every layer.")
@click.option("--l1", default=1e-3, show_default=True, help="Weight of the penalty: more is sparser.")
@click.option("--l1-ramp", default=0.1, show_default=True, help="Share of the steps in which it rises.")
@click.option("--bridge", default=2.0, show_default=True, help="Weight of the bridging losses; 0: none.")
@click.option(
    "--loss",
    type=click.Choice(["kl", "lm"]),
    default="kl",
    show_default=True,
    help="lm: next tokens instead.",
)
@click.option("--bias-only", is_flag=True, help="Biases and no features: what features have to beat.")
@training_options
@verb
def train(
    run: Run, target: str, base: str, data: str, out: Path, training: dict[str, Any], **options: Any
) -> None:
    """Train adapters so that BASE's MLPs with them act like those of TARGET, the fine-tuned model."""
    from fasttc.training import train_adapters

    model, tokenizer = load_model(run, target)
    base_model, base_tokenizer = load_model(run, base)
    adapters, report = train_adapters(
        model,
        base_model,
        data,
        tokenizer,
        base_tokenizer=base_tokenizer,
        out=out,
        seed=run.seed,
        **options,
        **training,
    )
    text = f"{_summary(report)}\n\n{costs(report)}\nwrote {adapters!r}: {out}"
    run.finish({"out": str(out), **report.to_dict()}, text)


@command.command("evaluate")
@click.argument("target")
@click.option("--base", required=True, help="The model that TARGET came from.")
@click.option("--adapters", required=True, help="Folder or hub reference of the adapters.")
@data_options()
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@click.option("--tokens", default=32_768, show_default=True, help="About how many; 0: the whole split.")
@click.option("--per-layer/--all-layers-only", default=True, help="Also every layer alone.")
@plot_option("Error, KL and L0 by layer, without and with adapters,")
@verb
def evaluate(
    run: Run,
    target: str,
    base: str,
    adapters: str,
    tokens: int,
    data: str,
    plot: Path | None,
    **options: Any,
) -> None:
    """Measure the hybrid of TARGET and BASE, without and with adapters, against TARGET on held-out text."""
    from fasttc.evaluation import evaluate_adapters

    model, tokenizer = load_model(run, target)
    found = evaluate_adapters(
        model,
        load_model(run, base)[0],
        _load_adapters(run, adapters),
        data,
        tokenizer=tokenizer,
        tokens=tokens or None,
        **options,
    )
    if plot is not None:
        from fasttc.report.plots import adapters_by_layer

        adapters_by_layer(found.to_dict(), plot)
        run.say(f"wrote {plot}")
    run.finish(found.to_dict(), _summary(found))


@command.command("generate")
@click.argument("target")
@click.option("--base", required=True, help="The model that TARGET came from.")
@click.option("--adapters", help="Folder or hub reference of the adapters. Default: the hybrid without any.")
@click.option("--ablate", help="Features to leave out, as LAYER:INDEX pairs: 0:12,3:7.")
@click.option("--only", help="Features to leave on, all others out.")
@click.option("--prompt-ids", required=True, help="Token ids that the text begins with: 1,17,9.")
@click.option("-n", "--samples", "n", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--tokens", default=128, show_default=True, help="Tokens at most, the prompt included.")
@click.option(
    "--temperature", default=1.0, show_default=True, type=click.FloatRange(min=0), help="0: greedy."
)
@verb
def generate(
    run: Run,
    target: str,
    base: str,
    adapters: str | None,
    ablate: str | None,
    only: str | None,
    prompt_ids: str,
    n: int,
    tokens: int,
    temperature: float,
) -> None:
    """Let the hybrid of TARGET and BASE write, with adapters on, off, or some features switched off."""
    from fasttc.models import check_same_tokenizer, hybrid, sample

    if (ablate or only) and adapters is None:
        raise ValueError("--ablate and --only: expected --adapters with them, got none")
    if ablate and only:
        raise ValueError("expected one of --ablate and --only, got both")
    model, tokenizer = load_model(run, target)
    base_model, base_tokenizer = load_model(run, base)
    check_same_tokenizer(tokenizer, base_tokenizer)
    loaded = None if adapters is None else _load_adapters(run, adapters)
    if loaded is not None and ablate:
        loaded = loaded.ablated(_features(ablate, "--ablate"))
    elif loaded is not None and only:
        loaded = loaded.only(_features(only, "--only"))
    start = parse_ids(prompt_ids, "--prompt-ids") or []
    with hybrid(model, base_model, loaded):
        rows = sample(
            model,
            start,
            n=n,
            max_tokens=tokens,
            temperature=temperature,
            seed=run.seed,
            eos_id=getattr(tokenizer, "eos_token_id", None),
        )
    texts = [
        str(row) if tokenizer is None else tokenizer.decode(row, skip_special_tokens=True) for row in rows
    ]
    run.finish({"samples": texts, "input_ids": rows}, "\n\n".join(texts))


def _load_adapters(run: Run, reference: str) -> Any:
    from fasttc.formats import AdapterSet

    return AdapterSet.from_pretrained(reference, device=run.device)


def _features(text: str, option: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(int(number) for number in pair.split(":")) for pair in text.split(",")]
        return [(layer, feature) for layer, feature in pairs]
    except ValueError as error:
        raise ValueError(f"{option}: expected LAYER:INDEX pairs (0:12,3:7), got {text!r}") from error


def _summary(found: Any) -> str:
    """KL, top-1 error and L0 of the hybrid and of the adapted hybrid, as a table."""
    rows = [
        {"": name, "KL": quality.kl, "top-1 error": quality.top1_error, "NMSE, last layer": quality.nmse[-1]}
        | {"mean L0": quality.mean_l0}
        for name, quality in (("hybrid", found.hybrid), ("adapted", found.adapted))
    ]
    return f"{table(rows)}\n{found.kl_recovered:.1%} of the hybrid's KL to the target taken away"
