"""``fasttc graph``: what is done to attribution graphs."""

from math import isnan
from pathlib import Path

import click

from fasttc._files import finite
from fasttc.cli import graph_diff, graph_files, graph_merge, graph_paths, graph_view
from fasttc.cli._common import Run, verb
from fasttc.cli._graphs import read_whole


@click.group("graph")
def command() -> None:
    """Prune, merge, compare, trace, view and export attribution graphs."""


for verb_file in (graph_merge, graph_paths, graph_diff, graph_view):
    command.add_command(verb_file.command)
command.add_command(graph_files.export)
command.add_command(graph_files.import_json)


@command.command("prune")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the pruned graph goes.",
)
@click.option(
    "--node-threshold", default=0.8, show_default=True, help="Share of the influence that kept nodes hold."
)
@click.option("--edge-threshold", default=0.98, show_default=True, help="The same for kept edges.")
@verb
def prune(run: Run, graph: Path, out: Path, node_threshold: float, edge_threshold: float) -> None:
    """Keep the nodes and edges of GRAPH that carry most of the influence.

    The rule is circuit-tracer's: nodes by influence, then edges of the re-normalised rest, then a clean-up of what
    was left without inputs or outputs. Of a GRAPH that was pruned before, the shares are of what was kept.
    """
    from fasttc.graph import PrunedGraph

    given = read_whole(graph)
    pruned = given.prune(node_threshold, edge_threshold)
    pruned.save(out)
    before, after = (
        {"nodes": one.n_nodes, "features": one.n_features, "edges": one.n_edges} for one in (given, pruned)
    )
    scores = {
        "scores": pruned.full_scores,
        "scores_as_read": given.scores() if isinstance(given, PrunedGraph) else None,
        "pruned_scores": pruned.scores(),
    }
    result = {
        "out": str(out),
        "before": before,
        "after": after,
        **{name: found and finite(found._asdict()) for name, found in scores.items()},
    }
    lines = [
        f"{title:12} {', '.join(f'{name} {value:.4f}' for name, value in found._asdict().items())}"
        for title, found in zip(("whole graph:", "as read:", "kept part:"), scores.values(), strict=True)
        if found and not isnan(found.replacement)  # an imported graph does not know the scores of its whole
    ]
    run.finish(
        result,
        f"kept {pruned.n_nodes:,} of {given.n_nodes:,} nodes and {pruned.n_edges:,} of {given.n_edges:,} edges\n"
        + "\n".join(lines)
        + f" (what was dropped counts as unexplained)\nwrote {out}",
    )
