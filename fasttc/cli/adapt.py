"""``fasttc adapt``: PAT, transcoders of a base model carried over to a fine-tuned one."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import Run, load_model, load_transcoders, verb
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
def command(
    run: Run,
    model: str,
    transcoders: str,
    data: str,
    out: Path,
    train: tuple[str, ...],
    training: dict[str, Any],
    closed: dict[str, Any],
    **options: Any,
) -> None:
    """Adapt the transcoders of a base model to MODEL, its fine-tuned descendant.

    Starts from the base's weights and aims at the fine-tuned MLPs on the fine-tuned model's own inputs.
    """
    from fasttc.training import adapt

    language_model, tokenizer = load_model(run, model)
    tcs, report = adapt(
        language_model,
        load_transcoders(run, transcoders),
        data,
        tokenizer,
        out=out,
        train=train or None,
        seed=run.seed,
        **options,
        **training,
        **closed,
    )
    result = {"out": str(out), **report.to_dict()}
    run.finish(result, f"{layer_table(report)}\n\n{costs(report)}\nwrote {tcs!r}: {out}")
