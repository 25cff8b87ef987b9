"""``fasttc shift``: how far fine-tuning moved what a model holds of documents, class by class."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._adapters import load_pair
from fasttc.cli._common import Run, plot_option, table, verb


@click.command("shift")
@click.argument("target")
@click.option("--base", required=True, help="The model that TARGET came from.")
@click.option(
    "--data", required=True, help="A .jsonl, .json or .parquet file, or a data set id; records with fields."
)
@click.option("--text", default="{text}", show_default=True, help="How a record becomes a document.")
@click.option(
    "--class", "label", required=True, help="How a record becomes the name of its class: '{disease}'."
)
@click.option(
    "--pool",
    type=click.Choice(["mean", "last"]),
    default="mean",
    show_default=True,
    help="What stands for a document: the mean over its tokens, or its last token.",
)
@click.option(
    "--per-class", default=200, show_default=True, help="Documents at most of each class, drawn by --seed."
)
@click.option("--context", default=128, show_default=True, help="Tokens at most of a document.")
@click.option("--batch-size", default=16, show_default=True, help="Documents at a time.")
@click.option(
    "--layer", type=click.IntRange(min=0), help="Of the table by class; 0: embeddings. Default: the last."
)
@plot_option("Shift by layer, and the plane of the chosen layer,")
@verb
def command(
    run: Run,
    target: str,
    base: str,
    data: str,
    text: str,
    label: str,
    layer: int | None,
    plot: Path | None,
    **options: Any,
) -> None:
    """Say how far the classes of documents moved in TARGET, against BASE, layer by layer.

    Shifts of class means in units of the spread within classes; what a class does not share with the others, beside
    the 95th percentile of shuffled classes; cosines; how well classes are apart (silhouette) before and after.
    """
    from fasttc.analysis import read_classes, representation_shift
    from fasttc.models import anatomy

    documents, labels = read_classes(data, text=text, label=label)
    model, base_model, tokenizer = load_pair(run, target, base)
    last = anatomy(model).n_layers
    if layer is not None and layer > last:
        raise ValueError(f"--layer: expected at most {last}, which the final norm reads, got {layer}")
    report = representation_shift(model, base_model, documents, labels, tokenizer, seed=run.seed, **options)
    chosen = report.layers[last if layer is None else layer]
    if plot is not None:
        from fasttc.report.plots import shift_by_layer

        shift_by_layer(report.to_dict(), plot, layer=chosen.layer)
        run.say(f"wrote {plot}")
    run.finish(report.to_dict(), f"{_layers(report)}\n\nlayer {chosen.layer}\n{_classes(chosen)}")


def _layers(report: Any) -> str:
    return table(
        [
            {"layer": found.layer, "mean shift": found.mean_shift, "spread": found.spread}
            | {"silhouette, base": found.silhouette_base, "fine-tuned": found.silhouette_tuned}
            for found in report.layers
        ]
    )


def _classes(layer: Any) -> str:
    return table(
        [
            {"class": c.name, "documents": c.documents, "shift": c.shift, "in the plane": c.plane_shift}
            | {"own": c.own, "own, by chance": c.own_by_chance, "cosine": c.cosine}
            for c in sorted(layer.classes, key=lambda c: -c.shift)
        ]
    )
