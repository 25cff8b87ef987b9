"""What the verbs for graphs share: reading them, and naming nodes on the command line."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def read_pruned(path: Path) -> Any:
    """A pruned graph; a whole one is pruned at 0.8 / 0.98, of a merged one its nodes before merging."""
    from fasttc.graph import Graph, MergedGraph, load_graph

    loaded = load_graph(path)
    if isinstance(loaded, MergedGraph):
        return loaded.pruned
    return loaded.prune() if isinstance(loaded, Graph) else loaded


def read_whole(path: Path) -> Any:
    """A graph as it is in the file: whole, or the kept part with what pruning found."""
    from fasttc.graph import MergedGraph, load_graph

    loaded = load_graph(path)
    return loaded.pruned if isinstance(loaded, MergedGraph) else loaded


def ids_of(graph: Any) -> list[str]:
    """Id of each node of the graph that paths run in; empty for nodes that were not kept."""
    from fasttc.graph import PrunedGraph, node_ids, whole_graph

    ids = node_ids(whole_graph(graph))
    if not isinstance(graph, PrunedGraph):
        return ids
    return [own if kept else "" for own, kept in zip(ids, graph.compact().node_mask.tolist(), strict=True)]


def nodes_named(graphs: Iterable[Any], given: Sequence[str], groups: Any, option: str) -> list[list[int]]:
    """For each graph, numbers of the nodes that a user named: ids, ``LAYER/FEATURE`` at any position (``LAYER/A17``:
    the adapter's), or groups of a supernode file. A graph need not have all of them.

    Raises:
        ValueError: a name that is none of these in any of the graphs.
    """
    found, unknown = [], set(given)
    for graph in graphs:
        places = _places(graph) if given else {}
        numbers: list[int] = []
        for name in given:
            here = places.get(name, [])
            if not here and groups is not None:
                here = [node for member in groups.groups.get(name, ()) for node in places.get(member, [])]
            numbers += here
            unknown -= {name} if here else set()
        found.append(numbers)
    for name in given:
        if name in unknown:
            raise ValueError(
                f"{option}: expected a node id, LAYER/FEATURE or a group, of at least one of the graphs, got {name!r}"
            )
    return found


def _places(graph: Any) -> dict[str, list[int]]:
    """Nodes by id and by ``LAYER/FEATURE``."""
    from fasttc.graph import whole_graph
    from fasttc.graph.names import feature_numbers

    whole = whole_graph(graph)
    found = {node_id: [node] for node, node_id in enumerate(ids_of(graph)) if node_id}
    layers = whole.features[:, 0].tolist()
    for node, (layer, own) in enumerate(zip(layers, feature_numbers(whole), strict=True)):
        found.setdefault(f"{layer}/{own}", []).append(node)
    return found
