"""``fasttc intervene``: features changed in the running model."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from fasttc.cli._common import Run, load_model, load_transcoders, one_prompt, table, verb

if TYPE_CHECKING:
    from fasttc.attribution import Effect, Intervention

_FEATURES = re.compile(r"(?P<layer>\d+)/(?P<features>all|\d+(,\d+)*)(@(?P<positions>[-\d:,]+))?")


@click.command("intervene")
@click.argument("model")
@click.option("--transcoders", required=True, help="Folder or hub reference of the transcoders.")
@click.option("--prompt", help="The text to run.")
@click.option("--prompt-ids", help="The same as token ids, used as given: 2,17,9.")
@click.option(
    "--feature",
    "features",
    multiple=True,
    help="LAYER/INDEX[,INDEX...][@POSITIONS], repeatable: 3/17, 3/17,40@5, 2/9@-1, 2/9@4: (from 4 on), 5/all. "
    "Default: everywhere.",
)
@click.option(
    "--set", "set_", type=float, help="New activation. Without any of these four: 0, which ablates."
)
@click.option("--scale", type=float, help="Multiply the activation: 2 doubles, -1 flips.")
@click.option("--add", type=float, help="Add to the activation.")
@click.option(
    "--negate",
    type=float,
    help="Add all features with negated decoders at this strength, instead of --feature.",
)
@click.option("--freeze-attention", is_flag=True, help="Keep the original attention patterns.")
@click.option("--freeze-norms", is_flag=True, help="Keep the original norm scales.")
@click.option(
    "--constrain", help="FIRST:LAST: layers whose MLP outputs stay the original ones, both included."
)
@click.option("--generate", default=0, show_default=True, help="Also continue the prompt by so many tokens.")
@click.option("--temperature", default=0.0, show_default=True, help="Of --generate; 0: greedy.")
@click.option("--control", is_flag=True, help="Compare with as many random features of the same layers.")
@click.option("--match", help="For --control: a data file; random features then fire as often on it.")
@click.option("--top", default=10, show_default=True, help="Rows of the tables.")
@verb
def command(
    run: Run,
    model: str,
    transcoders: str,
    prompt: str | None,
    prompt_ids: str | None,
    features: tuple[str, ...],
    set_: float | None,
    scale: float | None,
    add: float | None,
    negate: float | None,
    freeze_attention: bool,
    freeze_norms: bool,
    constrain: str | None,
    generate: int,
    temperature: float,
    control: bool,
    match: str | None,
    top: int,
) -> None:
    """Change features of the running MODEL and see what becomes of its next token.

    (new - old activation) times the feature's decoder row is added to what the MLP puts out; everything downstream
    reacts, unless it is frozen or constrained. What to change: the nodes of `fasttc attribute`.
    """
    import torch

    from fasttc.attribution import intervene, random_control

    language_model, tokenizer = load_model(run, model)
    tcs = load_transcoders(run, transcoders)
    given = one_prompt(prompt, prompt_ids, tokenizer)
    changes = _changes(tcs, features, negate, {"set": set_, "scale": scale, "add": add})
    sampling = {"do_sample": True, "temperature": temperature} if temperature else None
    layers = None if constrain is None else _layers(constrain)

    def effect_of(interventions: list["Intervention"]) -> "Effect":
        torch.manual_seed(run.seed)
        return intervene(
            language_model,
            tcs,
            given,
            interventions,
            tokenizer=tokenizer,
            freeze_attention=freeze_attention,
            freeze_norms=freeze_norms,
            constrained_layers=layers,
            activations=True,
            max_new_tokens=generate,
            generation=sampling,
        )

    effects = {"chosen": effect_of(changes)}
    if control:
        rates = None if match is None else _firing_rates(language_model, tcs, tokenizer, match)
        effects["random"] = effect_of(random_control(changes, tcs, seed=run.seed, rates=rates))
    result = {name: _result(effect, tokenizer, top) for name, effect in effects.items()}
    run.finish(result, "\n\n".join(_text(name, found) for name, found in result.items()))


def _changes(
    tcs: Any, features: Iterable[str], negate: float | None, actions: dict[str, float | None]
) -> list["Intervention"]:
    from fasttc.attribution import negated

    if (negate is None) == (not features):
        raise ValueError("expected exactly one of --feature and --negate")
    if negate is None:
        action, value = _action(actions)
        return [parse_feature(text, action, value) for text in features]
    if set(actions.values()) != {None}:
        raise ValueError("expected --negate alone, got it with --set, --scale or --add")
    return negated(tcs, negate)


def parse_feature(text: str, action: Any, value: float) -> "Intervention":
    """``"3/17,40@5"`` as an intervention.

    Raises:
        ValueError: another form.
    """
    from fasttc.attribution import Intervention

    found = _FEATURES.fullmatch(text)
    if found is None:
        raise ValueError(f"--feature: expected LAYER/INDEX[,INDEX...][@POSITIONS], got {text!r}")
    indices = None if found["features"] == "all" else [int(part) for part in found["features"].split(",")]
    return Intervention(int(found["layer"]), indices, _positions(found["positions"]), action, value)


def _positions(text: str | None) -> Any:
    if text is None:
        return None
    try:
        if ":" in text:
            first, stop = text.split(":")
            return slice(int(first) if first else None, int(stop) if stop else None)
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--feature: expected positions such as 5, 5,7, -1, 4: or 4:8, got {text!r}"
        ) from error


def _action(given: dict[str, float | None]) -> tuple[str, float]:
    chosen = [(name, value) for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise ValueError(f"expected at most one of --set, --scale and --add, got {len(chosen)}")
    return chosen[0] if chosen else ("set", 0.0)


def _layers(text: str) -> range:
    first, separator, last = text.partition(":")
    if not (separator and first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise ValueError(f"--constrain: expected FIRST:LAST (0:5), got {text!r}")
    return range(int(first), int(last) + 1)


def _firing_rates(model: Any, tcs: Any, tokenizer: Any, data: str) -> list[Any]:
    from fasttc.evaluation import evaluate

    report = evaluate(model, tcs, data, tokenizer=tokenizer, fractions=(0, 0, 1), context=64, per_layer=False)
    return [features.firing_rate for features in report.features]


def _result(effect: "Effect", tokenizer: Any, top: int) -> dict[str, Any]:
    def text(ids: Iterable[int]) -> str:
        return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(list(ids))

    changes = [
        {"next token": repr(text([change.token])), **change._asdict()} for change in effect.token_changes(top)
    ]
    generated = {}
    if effect.generated_before is not None and effect.generated_after is not None:
        generated = {
            "before": text(effect.generated_before.tolist()),
            "after": text(effect.generated_after.tolist()),
        }
    return {
        "interventions": [str(change) for change in effect.interventions],
        "kl": effect.kl(),
        "tokens": changes,
        "features": [change._asdict() for change in effect.feature_changes(top)],
        "generated": generated,
    }


def _text(name: str, found: dict[str, Any]) -> str:
    parts = [
        f"{name} features: KL of the next token {found['kl']:.4g} nats",
        table([{key: value for key, value in row.items() if key != "token"} for row in found["tokens"]]),
    ]
    if found["features"]:
        parts += ["activations that changed most", table(found["features"])]
    if found["generated"]:
        parts += [f"before: {found['generated']['before']!r}", f"after:  {found['generated']['after']!r}"]
    return "\n".join(parts)
