"""``fasttc graph``: what is done to attribution graphs."""

from pathlib import Path

import click

from fasttc.cli import graph_diff, graph_files, graph_merge, graph_paths, graph_view
from fasttc.cli._common import Run, verb


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
    was left without inputs or outputs.
    """
    from fasttc.graph import Graph

    whole = Graph.load(graph)
    pruned = whole.prune(node_threshold, edge_threshold)
    pruned.save(out)
    result = {
        "out": str(out),
        "before": {"nodes": whole.n_nodes, "features": whole.n_features, "edges": whole.n_edges},
        "after": {"nodes": pruned.n_nodes, "features": pruned.n_features, "edges": pruned.n_edges},
        "scores": pruned.full_scores._asdict(),
        "pruned_scores": pruned.scores()._asdict(),
    }
    run.finish(
        result,
        f"kept {pruned.n_nodes:,} of {whole.n_nodes:,} nodes and {pruned.n_edges:,} of {whole.n_edges:,} edges\n"
        f"whole graph: {_scores(pruned.full_scores)}\n"
        f"kept part:   {_scores(pruned.scores())} (what was dropped counts as unexplained)\nwrote {out}",
    )


def _scores(scores: object) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores._asdict().items())  # type: ignore[attr-defined]
