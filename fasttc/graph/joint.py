"""Two graphs of one prompt on one canvas: the union of their nodes and edges, each with its owner."""

from collections.abc import Collection
from typing import Any

from fasttc.graph.diff import Feature, check_owners
from fasttc.graph.export import graph_json, node_ids
from fasttc.graph.graph import Graph
from fasttc.graph.pruned import PrunedGraph


def joint_json(
    base: Graph | PrunedGraph,
    tuned: Graph | PrunedGraph,
    *,
    slug: str,
    carried: Collection[Feature] | None = None,
) -> dict[str, Any]:
    """The kept parts of both graphs as one object for the viewers of ``graph_json``.

    A node or link of both is written once, with the fine-tuned model's numbers. Ids are those of ``node_ids``: what is
    an error in one graph and a feature in the other is two nodes. Nodes and links have an extra entry
    ``owner`` (``"base"``, ``"tuned"``, ``"both"``, or ``"adapter"`` for an adapter's features), which viewers may
    colour by; ``influence_base`` and ``weight_base`` hold the base model's numbers.

    Args:
        base, tuned: graphs of one prompt, pruned at 0.8 / 0.98 if they are whole.
        slug: name of the joint graph.
        carried: transcoders' features that mean the same in both; others are two nodes, the base's with ``_base``
            after its id.

    Raises:
        ValueError: another prompt, owners as in :func:`fasttc.graph.diff`, or a slug that cannot name a file.
    """
    kept = [graph.prune() if isinstance(graph, Graph) else graph for graph in (base, tuned)]
    check_owners(*(pruned.graph for pruned in kept))
    contents = [graph_json(pruned, slug=slug) for pruned in kept]
    if contents[0]["metadata"]["prompt_tokens"] != contents[1]["metadata"]["prompt_tokens"]:
        raise ValueError("tuned: expected the graph of the same prompt, got other tokens")
    for content, pruned, ending in zip(contents, kept, ("_base", ""), strict=True):
        _rename(content, pruned, ending, None if carried is None else set(carried))
    old, new = ({node["node_id"]: node for node in content["nodes"]} for content in contents)
    nodes = _union(old, new, "influence")
    old, new = ({(link["source"], link["target"]): link for link in content["links"]} for content in contents)
    return {**contents[1], "nodes": nodes, "links": _union(old, new, "weight")}


def _rename(content: dict[str, Any], pruned: PrunedGraph, ending: str, carried: set[Feature] | None) -> None:
    """Ids that mean the same node in both graphs; features that are not carried over get ``ending``."""
    graph, names = pruned.graph, {}
    kept = pruned.node_mask.nonzero().squeeze(1).tolist()
    for number, own, node in zip(kept, node_ids(graph, pruned.node_mask), content["nodes"], strict=True):
        if carried is not None and number < graph.n_features and not graph.from_adapter[number]:
            layer, _, index = graph.features[number].tolist()
            own += "" if (layer, index) in carried else ending
        names[node["node_id"]] = own
        node["node_id"] = own
    for link in content["links"]:
        for end in ("source", "target"):
            link[end] = names[link[end]]


def _union(base: dict[Any, Any], tuned: dict[Any, Any], number: str) -> list[dict[str, Any]]:
    rows = []
    for key, entry in {**base, **tuned}.items():
        owner = "both" if key in tuned and key in base else "tuned" if key in tuned else "base"
        owner = "adapter" if entry.get("owner") == "adapter" else owner
        rows.append({**entry, "owner": owner, f"{number}_base": base[key][number] if key in base else None})
    return rows
