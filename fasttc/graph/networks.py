"""Graphs for general graph programs, through networkx: GraphML and dot."""

from pathlib import Path
from typing import Any

from fasttc._files import atomic_file
from fasttc.graph.export import node_ids
from fasttc.graph.graph import KINDS, Graph
from fasttc.graph.merged import MergedGraph
from fasttc.graph.names import node_names
from fasttc.graph.pruned import PrunedGraph

_NO_CONTROL = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], "\ufffd"
)


def to_networkx(graph: Graph | PrunedGraph | MergedGraph) -> Any:
    """A ``networkx.DiGraph`` of the kept nodes (of the supernodes, for a merged graph).

    Nodes have ``name``, ``kind``, ``influence`` and, before merging, ``layer``, ``position``, ``activation`` (features)
    and ``owner`` (features, in a graph with adapters); edges run from source to target and have ``weight`` (normalised,
    for a merged graph) and, for a merged graph, ``additive``. Names are text from elsewhere: characters that XML cannot
    hold are replaced.

    Args:
        graph: a graph is pruned at 0.8 / 0.98.
    """
    import networkx

    made = networkx.DiGraph()
    if isinstance(graph, MergedGraph):
        for number, (name, members, influence) in enumerate(
            zip(graph.names, graph.members(), graph.influence().tolist(), strict=True)
        ):
            kind = KINDS[int(graph.pruned.graph.node_kind[members[0]])]
            made.add_node(
                f"S{number}", name=_clean(name), kind=kind, members=len(members), influence=influence
            )
        targets, sources, weights = (tensor.tolist() for tensor in graph.edges())
        additive = graph.edges("additive")[2].tolist()
        for target, source, weight, total in zip(targets, sources, weights, additive, strict=True):
            made.add_edge(f"S{source}", f"S{target}", weight=weight, additive=total)
        return made
    pruned = (graph.prune() if isinstance(graph, Graph) else graph).compact()
    whole, names = pruned.graph, node_names(pruned.graph)
    kept = pruned.node_mask.nonzero().squeeze(1).tolist()
    ids = dict(zip(kept, node_ids(whole, pruned.node_mask), strict=True))
    for node in kept:
        about: dict[str, Any] = {"name": _clean(names[node]), "kind": KINDS[int(whole.node_kind[node])]}
        about |= {"layer": int(whole.node_layer[node]), "position": int(whole.node_position[node])}
        about["influence"] = float(pruned.influence[node])
        if node < whole.n_features:
            about["activation"] = float(whole.activations[node])
            about |= {"owner": whole.owners[node]} if whole.owners else {}
        made.add_node(ids[node], **about)
    targets, sources, weights = (tensor.tolist() for tensor in pruned.edges())
    for target, source, weight in zip(targets, sources, weights, strict=True):
        made.add_edge(ids[source], ids[target], weight=weight)
    return made


def write_network(graph: Graph | PrunedGraph | MergedGraph, path: str | Path, kind: str) -> None:
    """Writes ``to_networkx(graph)`` as ``"graphml"`` or ``"dot"``, whole or not at all.

    Raises:
        ValueError: another kind.
        ImportError: networkx (``dot``: and pydot) is missing; the extra ``circuits`` brings them.
        OSError: the file cannot be written.
    """
    if kind not in ("graphml", "dot"):
        raise ValueError(f"kind: expected 'graphml' or 'dot', got {kind!r}")
    import networkx

    made = to_networkx(graph)
    with atomic_file(path) as temporary:
        if kind == "graphml":
            networkx.write_graphml_xml(made, temporary)
        else:
            temporary.write_text(_dot(made), encoding="utf-8")


def _dot(made: Any) -> str:
    """Dot text. Every id and value is quoted here: pydot leaves strings alone that are quoted already."""
    import networkx

    quoted = networkx.DiGraph()
    for node, about in made.nodes(data=True):
        quoted.add_node(_quote(node), label=_quote(about["name"]), **_quoted(about))
    for source, target, about in made.edges(data=True):
        quoted.add_edge(_quote(source), _quote(target), **_quoted(about))
    return networkx.nx_pydot.to_pydot(quoted).to_string()


def _quoted(about: dict[str, Any]) -> dict[str, str]:
    return {key: _quote(str(value)) for key, value in about.items() if key != "name"}


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\n")
    return f'"{escaped}"'


def _clean(text: str) -> str:
    return text.translate(_NO_CONTROL)
