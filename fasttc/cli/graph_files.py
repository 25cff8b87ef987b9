"""``fasttc graph export`` and ``import``: graphs in the formats of other programs."""

from pathlib import Path

import click

from fasttc.cli._common import Run, verb


@click.command("export")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder (json) or file (others).")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["json", "graphml", "dot"]),
    default="json",
    show_default=True,
    help="json: circuit-tracer's and Neuronpedia's viewers; graphml, dot: any graph program.",
)
@click.option("--slug", help="Name of the graph in the viewer. Default: the file's name.")
@click.option("--scan", help="What the viewer calls the model. Default: as recorded in the graph.")
@click.option(
    "--groups",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A supernode file for the viewer (json). Default: the supernodes of a merged GRAPH.",
)
@verb
def export(
    run: Run, graph: Path, out: Path, kind: str, slug: str | None, scan: str | None, groups: Path | None
) -> None:
    """Write GRAPH for other programs.

    A graph that was not pruned is pruned at 0.8 / 0.98. With json, OUT/graph-metadata.json lists every graph in the
    folder; with graphml and dot, a merged graph is written as its supernodes.
    """
    from fasttc.graph import MergedGraph, Supernodes, load_graph, write_graph_json
    from fasttc.graph.networks import write_network

    loaded = load_graph(graph)
    if kind != "json":
        write_network(loaded, out, kind)
        written = out
    else:
        merged = isinstance(loaded, MergedGraph)
        made = Supernodes.load(groups) if groups else loaded.supernodes() if merged else None
        written = write_graph_json(
            loaded.pruned if merged else loaded,
            out,
            slug=slug or graph.stem,
            scan=scan,
            q_params=None if made is None else made.to_q_params(),
        )
    size = written.stat().st_size
    run.finish({"out": str(written), "bytes": size}, f"wrote {written} ({size:,} bytes)")


@click.command("import")
@click.argument("source", metavar="JSON", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the pruned graph goes.",
)
@click.option(
    "--save-groups",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the viewer's supernodes, pins and labels as a supernode file.",
)
@verb
def import_json(run: Run, source: Path, out: Path, save_groups: Path | None) -> None:
    """Read a graph JSON of circuit-tracer or Neuronpedia, so that the other verbs can work on it.

    Such files hold a pruned graph; what was dropped from it is unknown, so scores are those of the kept part.
    """
    from fasttc.graph import read_graph_json

    pruned, made = read_graph_json(source)
    pruned.save(out)
    if save_groups is not None:
        made.save(save_groups)
    ambiguous = pruned.graph.metadata["ambiguous_links"]
    result = {
        "out": str(out),
        "nodes": pruned.n_nodes,
        "features": pruned.n_features,
        "edges": pruned.n_edges,
    }
    text = f"{pruned.n_nodes:,} nodes, {pruned.n_edges:,} edges, {len(made.groups)} supernodes\nwrote {out}"
    if ambiguous:
        text += f"\n{ambiguous} links name an id that two nodes have; the feature was taken"
    run.finish({**result, "supernodes": len(made.groups), "ambiguous_links": ambiguous}, text)
