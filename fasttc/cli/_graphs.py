"""What the verbs for graphs share: reading them, and naming nodes on the command line."""

from collections.abc import Iterable
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

    if not isinstance(graph, PrunedGraph):
        return node_ids(graph)
    small = graph.compact()
    ids = [""] * whole_graph(graph).n_nodes
    kept = small.node_mask.nonzero().squeeze(1).tolist()
    for node, node_id in zip(kept, node_ids(small.graph, small.node_mask), strict=True):
        ids[node] = node_id
    return ids


def nodes_named(graph: Any, ids: list[str], given: Iterable[str], groups: Any, option: str) -> list[int]:
    """Numbers of the nodes that a user named: ids, ``LAYER/FEATURE`` at any position (``LAYER/A17``: the adapter's), or
    groups of a supernode file.

    Raises:
        ValueError: a name that is none of these in this graph.
    """
    from fasttc.graph import whole_graph
    from fasttc.graph.names import feature_numbers

    whole = whole_graph(graph)
    by_name: dict[str, list[int]] = {}
    for node, (layer, own) in enumerate(
        zip(whole.features[:, 0].tolist(), feature_numbers(whole), strict=True)
    ):
        by_name.setdefault(f"{layer}/{own}", []).append(node)
    number = {node_id: node for node, node_id in enumerate(ids) if node_id}
    found: list[int] = []
    for name in given:
        if name in number:
            here = [number[name]]
        elif groups is not None and name in groups.groups:
            here = [number[member] for member in groups.groups[name] if member in number]
        else:
            here = by_name.get(name, [])
        if not here:
            raise ValueError(
                f"{option}: expected a node id, LAYER/FEATURE or the name of a group of this graph, got {name!r}"
            )
        found += here
    return found
