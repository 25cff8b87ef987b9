"""``fasttc graph merge``."""

from pathlib import Path
from typing import Any

import click

from fasttc._files import finite
from fasttc.cli._common import Run, table, verb
from fasttc.cli._data import data_options
from fasttc.cli._graphs import read_pruned
from fasttc.cli._merge_evidence import merge_evidence

_BOUNDS = ("budget", "min_agreement", "min_edges")


@click.command("merge")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Where the merged graph goes.")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A supernode file: merge what it says, nothing else.",
)
@click.option(
    "--supernodes", type=int, help="How many to leave. Default: as few as the bounds of the loss allow."
)
@click.option(
    "--budget",
    default=0.1,
    show_default=True,
    help="Share of the pruned graph's completeness that merging may lose.",
)
@click.option(
    "--min-agreement", default=0.92, show_default=True, help="Least agreement of signs within supernodes."
)
@click.option(
    "--min-edges",
    default=0.83,
    show_default=True,
    help="Least share of absolute edge weight that does not cancel.",
)
@click.option(
    "--transcoders",
    metavar="TCS",
    help="Also compare the features' encoder and decoder rows in this set.",
)
@click.option("--model", help="Also compare on which tokens of --data the features are active in this model.")
@data_options(required=False)
@click.option("--tokens", default=20_000, show_default=True, help="About how many of --data.")
@click.option(
    "--save-groups",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the supernodes as a file that can be edited, here or in the page.",
)
@verb
def command(
    run: Run,
    graph: Path,
    out: Path | None,
    source: Path | None,
    supernodes: int | None,
    budget: float,
    min_agreement: float,
    min_edges: float,
    transcoders: str | None,
    model: str | None,
    data: str | None,
    save_groups: Path | None,
    **options: Any,
) -> None:
    """Merge the nodes of GRAPH that play the same part into supernodes, and say what that loses.

    GRAPH is a pruned graph; a whole one is pruned at 0.8 / 0.98 first. Nodes merge if their signed inputs and outputs
    are alike, as far as --budget, --min-agreement and --min-edges allow: bounds of what is merged without --from and
    --supernodes, which say it themselves.
    """
    from fasttc.graph import MergeBounds, Supernodes, merge, merge_by

    if source is not None:
        _refuse_beside("--from", "supernodes", "transcoders", "model", "data", *_BOUNDS)
    if supernodes is not None:
        _refuse_beside("--supernodes", *_BOUNDS)
    pruned = read_pruned(graph)
    missing: list[str] = []
    if source is not None:
        merged, missing = merge_by(pruned, Supernodes.load(source))
    else:
        if not 0 <= budget <= 1:
            raise ValueError(f"--budget: expected a share from 0 to 1, got {budget}")
        bounds = MergeBounds(completeness=1 - budget, sign_agreement=min_agreement, edges=min_edges)
        evidence = merge_evidence(run, pruned.compact().graph, transcoders, model, data, options)
        merged = merge(pruned, supernodes=supernodes, bounds=bounds, evidence=evidence)
    if out is not None:
        merged.save(out)
    if save_groups is not None:
        merged.supernodes().save(save_groups)
    found = _supernodes(merged)
    text = [
        *_told(found, merged.loss),
        *([f"{len(missing)} nodes of {source} are not in this graph"] if missing else []),
        *(f"wrote {path}" for path in (out, save_groups) if path is not None),
    ]
    loss = finite(merged.loss.to_dict())
    run.finish(
        {"out": str(out) if out else None, "loss": loss, "supernodes": found, "missing": missing},
        "\n".join(text),
    )


def _refuse_beside(option: str, *names: str) -> None:
    """Raises: ValueError for a named option that was given though ``option`` leaves it no part to play."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            given = f"--{name.replace('_', '-')}"
            raise ValueError(f"{given}: expected none beside {option}, got {context.params[name]}")


def _told(found: list[dict[str, Any]], loss: Any) -> list[str]:
    """What was merged and what it cost, for people."""
    sizes = f"{loss.nodes_before} nodes -> {loss.nodes_after} supernodes"
    if not found:
        return [f"{sizes}: no node of this graph has an edge"]
    return [
        table([row for row in found if row["members"] > 1] or found),
        f"{sizes}: {loss.nodes_before / loss.nodes_after:.1f} times fewer",
        f"kept: completeness {loss.completeness_kept:.3f} ({loss.pruned.completeness:.3f} -> "
        f"{loss.merged.completeness:.3f}), replacement {loss.replacement_kept:.3f}, "
        f"influence {loss.influence_kept:.3f}",
        f"signs agree: {loss.sign_agreement:.3f}; edges not cancelled: {loss.edges_kept:.3f}; "
        f"inside supernodes: {loss.internal:.3f} of the edge weight",
    ]


def _supernodes(merged: Any) -> list[dict[str, Any]]:
    influence = merged.influence().tolist()
    members = [len(nodes) for nodes in merged.members()]
    rows = [
        {"supernode": name, "members": size, "influence": share}
        for name, size, share in zip(merged.names, members, influence, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["influence"])
