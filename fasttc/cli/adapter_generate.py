"""``fasttc adapter generate``: what the hybrid writes with adapters on, off, or some features changed."""

from typing import Any

import click

from fasttc.cli._adapters import load_adapters, load_pair, parse_features
from fasttc.cli._common import Run, load_model, one_prompt, verb


@click.command("generate")
@click.argument("target")
@click.option("--base", help="The model that TARGET came from. Not needed with --steer.")
@click.option("--adapters", help="Folder or hub reference of the adapters. Default: the hybrid without any.")
@click.option(
    "--ablate", help="Features to leave out, as LAYER:INDEX pairs (0:12,3:7) or @FILE with such pairs."
)
@click.option("--only", help="Features to leave on, all others out; decoder biases stay.")
@click.option(
    "--scale",
    "scales",
    multiple=True,
    help="FEATURES=FACTOR, repeatable: 0:12,3:7=4 amplifies, 2:5=-1 negates, @FILE=0.5 halves those of a file.",
)
@click.option(
    "--steer",
    type=float,
    help="Instead of the hybrid: TARGET with its own MLPs, and adapters times this beside them (-0.5 takes back).",
)
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-ids", help="The same as token ids, used as given: 1,17,9.")
@click.option("-n", "--samples", "n", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--tokens", default=128, show_default=True, help="Tokens at most, the prompt included.")
@click.option(
    "--temperature", default=1.0, show_default=True, type=click.FloatRange(min=0), help="0: greedy."
)
@verb
def command(
    run: Run,
    target: str,
    base: str | None,
    adapters: str | None,
    ablate: str | None,
    only: str | None,
    scales: tuple[str, ...],
    steer: float | None,
    prompt: str | None,
    prompt_ids: str | None,
    n: int,
    tokens: int,
    temperature: float,
) -> None:
    """Let the hybrid of TARGET and BASE write, with adapters on, off, or some features changed.

    Or TARGET itself with --steer. Options for features go together; factors of a feature named twice multiply.
    """
    from fasttc.attribution.prompt import token_ids
    from fasttc.models import hybrid, sample, steered

    if (base is None) == (steer is None):
        raise ValueError("expected exactly one of --base and --steer")
    if adapters is None and (ablate or only or scales or steer is not None):
        raise ValueError("--ablate, --only, --scale, --steer: expected --adapters with them, got none")
    changed: Any = None
    if adapters is not None:
        changed = _changed(load_adapters(run, adapters), ablate, only, scales)
    if base is None:
        model, tokenizer = load_model(run, target)
        place = steered(model, changed.scaled(steer))
    else:
        model, base_model, tokenizer = load_pair(run, target, base)
        place = hybrid(model, base_model, changed)
    start = one_prompt(prompt, prompt_ids, tokenizer)
    start = token_ids(start, tokenizer, prepend_bos=True).tolist()
    with place:
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


def _changed(adapters: Any, ablate: str | None, only: str | None, scales: tuple[str, ...]) -> Any:
    """The adapters with what the options ask for."""
    if only:
        adapters = adapters.only(parse_features(only, "--only"))
    if ablate:
        adapters = adapters.ablated(parse_features(ablate, "--ablate"))
    for text in scales:
        features, _, factor = text.rpartition("=")
        try:
            number = float(factor)
        except ValueError as error:
            raise ValueError(f"--scale: expected FEATURES=FACTOR (0:12,3:7=4), got {text!r}") from error
        adapters = adapters.with_factors(dict.fromkeys(parse_features(features, "--scale"), number))
    return adapters
