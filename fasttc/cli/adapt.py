"""``fasttc adapt``: PAT, transcoders of a base model carried over to a fine-tuned one."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._carry_over import carried_over
from fasttc.cli._common import Run, is_first, load_model, load_transcoders, placement_options, verb
from fasttc.cli._data import data_options
from fasttc.cli._training import costs, layer_table, training_options, transcoder_options

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")


@click.command("adapt")
@click.argument("model")
@click.option("--transcoders", required=True, help="Transcoders of the base model: folder or hub reference.")
@data_options()
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the result."
)
@click.option("--train", multiple=True, type=click.Choice(PARAMETERS), help="Train only this (repeatable).")
@click.option("--train-threshold", is_flag=True, help="JumpReLU thresholds train too.")
@click.option("--target-l0", type=float, help="Of JumpReLU and ReLU. Default: the base's on the same text.")
@transcoder_options
@training_options
@verb
@placement_options
def command(
    run: Run,
    model: str,
    transcoders: str,
    data: str,
    out: Path,
    place: str | None,
    train: tuple[str, ...],
    training: dict[str, Any],
    fitting: dict[str, Any],
    **options: Any,
) -> None:
    """Adapt the transcoders of a base model to MODEL, its fine-tuned descendant.

    Starts from the base's weights and aims at the fine-tuned MLPs on the fine-tuned model's own inputs. The folder
    OUT.run holds the log, the report and features.csv: for every feature whether its label still holds.
    """
    from fasttc.training import adapt, open_data

    language_model, tokenizer = load_model(run, model)
    base = load_transcoders(run, transcoders)
    reading = {name: options.pop(name) for name in ("text", "context", "split_seed")}
    opened = open_data(language_model, data, tokenizer, **reading)
    tcs, report = adapt(
        language_model,
        base,
        opened,
        out=out,
        train=train or None,
        seed=run.seed,
        device=place,
        **options,
        **training,
        **fitting,
    )
    if not is_first():  # of several processes one measures and prints
        return
    file = out.with_name(f"{out.name}.run") / "features.csv"
    carried, shown = carried_over(language_model, base, tcs, opened, file, split="validation", tokens=16_384)
    result = {"out": str(out), **report.to_dict(), **carried}
    run.finish(result, f"{layer_table(report)}\n\n{shown}\n\n{costs(report)}\nwrote {tcs!r}: {out}")
