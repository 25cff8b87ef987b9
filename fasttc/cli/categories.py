"""``fasttc categories``: features by relevance and correctness, from labels that a person, a file or a judge gives."""

import json
from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import Run, table, verb


@click.command("categories")
@click.argument("features", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A .csv or .jsonl file with layer, feature, relevance and correctness.",
)
@click.option(
    "--judge",
    help="Or a program that gives them: it reads the lines of the first FEATURES and prints such JSON lines.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the labels as a .jsonl file for --labels: what a judge said need not be asked again.",
)
@verb
def command(
    run: Run, features: tuple[Path, ...], labels: Path | None, judge: str | None, keep: Path | None
) -> None:
    """Count features by relevance and correctness, and say what share of the writing each category does.

    FEATURES are files that `fasttc features --format lines` wrote. Several of them, such as those of base and adapted
    transcoders, get one table each by the same labels, which are of features of the first. A share is that of mean
    activation times decoder norm.
    """
    from fasttc.analysis import ask_command, feature_categories, read_features, read_labels

    if (labels is None) == (judge is None):
        raise ValueError("expected exactly one of --labels and --judge")
    read = {str(path): read_features(path) for path in features}
    if labels is not None:
        given = read_labels(labels)
    else:
        given = ask_command(judge or "", next(iter(read.values())))
    if keep is not None:
        _keep(keep, given)
        run.say(f"wrote {keep}")
    first, *others = read.items()
    tables = {first[0]: feature_categories(first[1], given)}
    for path, rows in others:  # base and adapted need not have all features in common
        there = {(row["layer"], row["feature"]) for row in rows}
        known = {place: label for place, label in given.items() if place in there}
        tables[path] = feature_categories(rows, known)
    result = {path: [category.to_dict() for category in found] for path, found in tables.items()}
    run.finish(
        {"labels": len(given), "categories": result},
        "\n\n".join(f"{path}\n\n{_shown(found)}" for path, found in tables.items()),
    )


def _keep(path: Path, labels: Any) -> None:
    from fasttc._files import atomic_file

    names = ("layer", "feature", "relevance", "correctness")
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for place, label in sorted(labels.items()):
            file.write(json.dumps(dict(zip(names, (*place, *label), strict=True)), ensure_ascii=False) + "\n")


def _shown(found: list[Any]) -> str:
    """All layers together, a line for each category; then a line for each layer."""
    whole = [category for category in found if category.layer is None]
    rows = [
        {"relevance": c.relevance, "correctness": c.correctness, "features": c.features}
        | {"active": c.active, "share of strength": _percent(c.share)}
        for c in whole
    ]
    layers = [
        {"layer": layer}
        | {
            f"{c.relevance}, {c.correctness}": f"{c.features}  {_percent(c.share)}"
            for c in found
            if c.layer == layer
        }
        for layer in sorted({c.layer for c in found if c.layer is not None})
    ]
    return f"{table(rows)}\n\nfeatures and share of each layer's strength\n{table(layers)}"


def _percent(share: float) -> str:
    return "-" if share != share else f"{share:.1%}"
