"""``fasttc graph export`` and ``import``: graphs in the formats of other programs."""

from pathlib import Path
from typing import Any

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
    help="A supernode file for the viewer (json): groups, pins, labels. Default: the supernodes of a merged GRAPH.",
)
@verb
def export(
    run: Run, graph: Path, out: Path, kind: str, slug: str | None, scan: str | None, groups: Path | None
) -> None:
    """Write GRAPH for other programs.

    A graph that was not pruned is pruned at 0.8 / 0.98. With json, OUT/graph-metadata.json lists every graph in the
    folder; with graphml and dot, a merged graph is written as its supernodes.
    """
    from fasttc.graph import Graph, MergedGraph, Supernodes, load_graph, node_ids, write_graph_json
    from fasttc.graph.networks import write_network

    if kind != "json" and groups is not None:
        raise ValueError(f"--groups: expected --format json, got {kind}")
    loaded = load_graph(graph)
    if kind != "json":
        write_network(loaded, out, kind)
        size = out.stat().st_size
        run.finish({"out": str(out), "bytes": size}, f"wrote {out} ({size:,} bytes)")
        return
    merged = isinstance(loaded, MergedGraph)
    made = Supernodes.load(groups) if groups else loaded.supernodes() if merged else Supernodes()
    pruned = loaded.pruned if merged else loaded.prune() if isinstance(loaded, Graph) else loaded
    q_params, labels = made.to_q_params(), dict[Any, str](made.labels)
    written = write_graph_json(
        pruned, out, slug=slug or graph.stem, scan=scan, q_params=q_params, labels=labels
    )
    ids = node_ids(pruned.graph, pruned.node_mask)
    of_outputs = len(set(ids[len(ids) - pruned.graph.n_logits :]) & labels.keys())
    kept, members = set(ids), [member for group in made.groups.values() for member in group]
    missing = [one for one in dict.fromkeys([*members, *made.pinned, *made.labels]) if one not in kept]
    size = written.stat().st_size
    text = [f"wrote {written} ({size:,} bytes)"]
    if missing:
        text.append(f"{len(missing)} nodes of {groups} are not in this graph")
    if of_outputs:
        text.append(
            f"{of_outputs} labels of outputs are not written: viewers name them by token and probability"
        )
    run.finish(
        {"out": str(written), "bytes": size, "missing": missing, "labels_left_out": of_outputs},
        "\n".join(text),
    )


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
        "supernodes": len(made.groups),
        "labels": len(made.labels),
        "ambiguous_links": ambiguous,
    }
    found = f"{len(made.groups)} supernodes, {len(made.labels)} labels"
    text = f"{pruned.n_nodes:,} nodes, {pruned.n_edges:,} edges, {found}\nwrote {out}"
    if save_groups is not None:
        text += f"\nwrote {save_groups}"
    elif made.groups or made.labels or made.pinned:
        text += (
            "\nsupernodes, labels and pins are not in it: --save-groups writes them to a file of their own"
        )
    if ambiguous:
        text += f"\n{ambiguous} links name an id that two nodes have; the feature was taken"
    run.finish(result, text)
