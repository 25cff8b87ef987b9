"""``fasttc train``: transcoders for every MLP of a model, from scratch."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import Run, load_model, placement_options, verb
from fasttc.cli._data import data_options
from fasttc.cli._training import costs, layer_table, training_options, transcoder_options


@click.command("train")
@click.argument("model")
@data_options()
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the transcoders.",
)
@click.option("--features", "n_features", default=4096, show_default=True, help="Features per layer.")
@click.option(
    "-k", "--k", default=32, show_default=True, help="Active features per token (a target for ReLU kinds)."
)
@click.option(
    "--activation",
    type=click.Choice(["topk", "batchtopk", "jumprelu", "relu"]),
    default="topk",
    show_default=True,
)
@click.option("--skip", is_flag=True, help="Add a linear path from input to output.")
@click.option(
    "--layer", "layers", multiple=True, type=int, help="Only this layer (repeatable). Default: all."
)
@transcoder_options
@training_options
@verb
@placement_options
def command(
    run: Run,
    model: str,
    data: str,
    out: Path,
    place: str | None,
    layers: tuple[int, ...],
    training: dict[str, Any],
    fitting: dict[str, Any],
    **options: Any,
) -> None:
    """Train transcoders for the MLPs of MODEL on its own activations over a text.

    All layers at once, from one forward pass. The folder OUT.run holds the log (metrics.jsonl), the report and the
    checkpoint: after Ctrl-C the same command with --resume goes on where it stopped.
    """
    from fasttc.training import train

    language_model, tokenizer = load_model(run, model)
    tcs, report = train(
        language_model,
        data,
        tokenizer,
        out=out,
        layers=layers or None,
        seed=run.seed,
        device=place,
        **options,
        **training,
        **fitting,
    )
    result = {"out": str(out), **report.to_dict()}
    run.finish(result, f"{layer_table(report)}\n\n{costs(report)}\nwrote {tcs!r}: {out}")
