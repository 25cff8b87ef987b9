"""What fine-tuning changed in one prompt's graph: nodes matched by identity, their influence before and after."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from fasttc.graph.export import node_ids
from fasttc.graph.graph import Graph
from fasttc.graph.influence import Array, edge_flow, start_mass
from fasttc.graph.names import node_names
from fasttc.graph.paths import strongest_paths
from fasttc.graph.pruned import PrunedGraph
from fasttc.graph.supernodes import Supernodes

Status = Literal["gained", "lost", "strengthened", "weakened", "kept"]
STATUSES: tuple[Status, ...] = ("gained", "lost", "strengthened", "weakened", "kept")
Feature = tuple[int, int]


@dataclass(frozen=True)
class Change:
    """Something in one of the graphs or both.

    Attributes:
        name: for people.
        key: what it is: ids of nodes as ``node_ids`` gives them (one for a node; source and target of an edge; all of a
            path, source first; the members of a supernode that are in one of the graphs).
        base, tuned: influence it carries in either graph, as a share of the logits'; 0 where it is not.
        status: of the change ``tuned - base``; "kept" below the least change that counts.
        trusted: False where a feature's two sides were declared different, so that it is not matched.
        feature: (layer, index) of a feature node; None for everything else.
    """

    name: str
    key: tuple[str, ...]
    base: float
    tuned: float
    status: Status
    trusted: bool = True
    feature: Feature | None = None

    @property
    def change(self) -> float:
        return self.tuned - self.base

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "name": self.name,
            "status": self.status,
            "base": self.base,
            "tuned": self.tuned,
        }
        return {**row, "change": self.change, "key": list(self.key), "trusted": self.trusted}


@dataclass(frozen=True)
class GraphDiff:
    """Changes, each list by falling size of the change."""

    nodes: list[Change]
    edges: list[Change]
    paths: list[Change]
    supernodes: list[Change]

    def to_dict(self) -> dict[str, Any]:
        names = ("nodes", "edges", "paths", "supernodes")
        return {name: [change.to_dict() for change in getattr(self, name)] for name in names}

    def features(self, *statuses: Status) -> list[Feature]:
        """(layer, index) of the feature nodes with one of these statuses, largest change first, each once."""
        found = [change.feature for change in self.nodes if change.feature and change.status in statuses]
        return list(dict.fromkeys(found))


class _Side(NamedTuple):
    """One of the two graphs, with everything per probability of its logits."""

    graph: Graph
    kept: Array  # [nodes] bool
    kept_edges: Array  # [edges] bool
    keys: list[tuple[Any, ...]]  # identity of each node
    number: dict[tuple[Any, ...], int]
    visited: Array  # [nodes]: influence; the probability, for logits
    flow: Array  # [edges]: influence that each stored edge carries
    targets: Array  # [edges]


def diff(
    base: Graph | PrunedGraph,
    tuned: Graph | PrunedGraph,
    *,
    supernodes: Supernodes | None = None,
    carried: Collection[Feature] | None = None,
    paths: int = 10,
    least_change: float = 0.005,
) -> GraphDiff:
    """Compares the graphs of one prompt in two models.

    Nodes are the same if they are the same feature at the same position, the error of the same layer and position,
    the same token or the same logit. The transcoders must number their features alike, as adapted ones do. A node or
    edge is listed if pruning kept it in one of the graphs (and, an edge, if it carries at least ``least_change`` in
    one); its influence is looked up in the *whole* graphs where they are at hand, so that nothing is lost or gained
    merely by crossing a threshold.

    Args:
        base, tuned: whole graphs (pruned here at 0.8 / 0.98) or pruned ones. A pruned graph from a file does not know
            what it dropped: there, what is not kept has influence 0.
        supernodes: groups by node id; the influence that enters a group from outside is compared.
        carried: features (layer, index) that still mean the same after fine-tuning. Others are not matched: they are
            lost in one graph and gained in the other, and marked as not trusted. None: all are matched. Features of
            adapters are in no such table and always matched by their number.
        paths: how many of the strongest paths to the first logit of each graph to compare; 0 for none.
        least_change: of influence, as a share of the logits', that counts as a change.

    Returns:
        All changes. Deterministic.

    Raises:
        ValueError: another prompt or number of layers, numbers that are a transcoder's feature in one graph and an
            adapter's in the other, a negative number.
    """
    if paths < 0 or least_change < 0:
        raise ValueError(f"paths, least_change: expected numbers >= 0, got {paths} and {least_change}")
    whole = [graph.prune() if isinstance(graph, Graph) else graph for graph in (base, tuned)]
    one, two = (pruned.graph for pruned in whole)
    if one.input_ids.tolist() != two.input_ids.tolist():
        raise ValueError("tuned: expected the graph of the same prompt, got other tokens")
    if one.n_layers != two.n_layers:
        raise ValueError(f"tuned: expected {one.n_layers} layers as in base, got {two.n_layers}")
    check_owners(one, two)
    trusted = None if carried is None else set(carried)
    sides = _side(whole[0], trusted, "base"), _side(whole[1], trusted, "tuned")
    names = _names(sides)
    return GraphDiff(
        nodes=_node_changes(sides, names, least_change),
        edges=_edge_changes(sides, names, least_change),
        paths=_path_changes(sides, names, paths, least_change) if paths else [],
        supernodes=_supernode_changes(sides, names, supernodes, least_change) if supernodes else [],
    )


def check_owners(base: Graph, tuned: Graph) -> None:
    """Whether the number of a feature says in both graphs whether it is a transcoder's or an adapter's.

    Raises:
        ValueError: graphs of which one has adapters where the other has a transcoder's features.
    """
    firsts = [graph.metadata.get("adapters_from") for graph in (base, tuned)]
    clash = None not in firsts and firsts[0] != firsts[1]
    for first, other in zip(firsts, (tuned, base), strict=True):
        if first is not None and None in firsts:
            clash |= any(index >= first[layer] for layer, _, index in other.features.tolist())
    if clash:
        raise ValueError(
            "tuned: expected adapters beside transcoders of the same width as in base, got numbers that are a "
            "transcoder's feature in one graph and an adapter's in the other"
        )


def _side(pruned: PrunedGraph, trusted: set[Feature] | None, owner: str) -> _Side:
    graph = pruned.graph
    arrived, start = pruned.influence.numpy(), start_mass(graph)
    visited, flow = (arrived + start) / start.sum(), edge_flow(graph, arrived) / start.sum()
    targets = np.repeat(np.arange(graph.n_nodes), graph.row_ptr.diff().numpy())
    keys: list[tuple[Any, ...]] = []
    adapted = graph.from_adapter.tolist()
    for (layer, position, index), of_adapter in zip(graph.features.tolist(), adapted, strict=True):
        same = trusted is None or of_adapter or (layer, index) in trusted
        keys.append(("feature", layer, position, index, "both" if same else owner))
    keys += [
        ("error", layer, position) for layer in range(graph.n_layers) for position in range(graph.n_tokens)
    ]
    keys += [("token", position) for position in range(graph.n_tokens)]
    for token in graph.logit_ids.tolist():
        copies = 0
        while ("logit", token, copies) in keys[-graph.n_logits :]:
            copies += 1
        keys.append(("logit", token, copies))
    number = {key: node for node, key in enumerate(keys)}
    masks = pruned.node_mask.numpy(), pruned.edge_mask.numpy()
    return _Side(graph, *masks, keys, number, visited, flow, targets)


def _names(sides: tuple[_Side, _Side]) -> dict[tuple[Any, ...], tuple[str, str]]:
    """Id and name of every node of both graphs."""
    found: dict[tuple[Any, ...], tuple[str, str]] = {}
    for side in reversed(sides):
        ids, names = node_ids(side.graph), node_names(side.graph)
        found.update(zip(side.keys, zip(ids, names, strict=True), strict=True))
    return found


def _status(base: float, tuned: float, least: float) -> Status:
    if abs(tuned - base) < least or tuned == base:
        return "kept"
    if base == 0:
        return "gained"
    if tuned == 0:
        return "lost"
    return "strengthened" if tuned > base else "weakened"


def _trusted(key: tuple[Any, ...]) -> bool:
    return key[0] != "feature" or key[-1] == "both"


def _sorted(changes: list[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: (-abs(change.change), change.key, change.name))


def _node_changes(
    sides: tuple[_Side, _Side], names: dict[Any, tuple[str, str]], least: float
) -> list[Change]:
    kept = dict.fromkeys(side.keys[node] for side in sides for node in np.flatnonzero(side.kept).tolist())
    changes = []
    for key in kept:
        base, tuned = (float(side.visited[side.number[key]]) if key in side.number else 0.0 for side in sides)
        is_feature = key[0] == "feature"
        changes.append(
            Change(
                name=names[key][1],
                key=(names[key][0],),
                base=base,
                tuned=tuned,
                status=_status(base, tuned, least),
                trusted=_trusted(key),
                feature=(key[1], key[3]) if is_feature else None,
            )
        )
    return _sorted(changes)


def _edge_changes(
    sides: tuple[_Side, _Side], names: dict[Any, tuple[str, str]], least: float
) -> list[Change]:
    keys = list(dict.fromkeys(key for side in sides for key in side.keys))
    union = {key: at for at, key in enumerate(keys)}
    total = len(keys)
    pairs = np.zeros(0, np.int64)  # target * total + source, in the numbering of both graphs together
    for side in sides:
        number = np.array([union[key] for key in side.keys])
        columns = side.graph.columns.numpy()[side.kept_edges]
        pairs = np.union1d(pairs, number[side.targets[side.kept_edges]] * total + number[columns])
    flows = []
    for side in sides:
        own = np.array([side.number.get(key, -1) for key in keys])
        flows.append(_flows(side, own[pairs // total], own[pairs % total]))
    counts = np.flatnonzero(np.maximum(*flows) >= least)
    changes = []
    for at in counts.tolist():
        target, source = keys[pairs[at] // total], keys[pairs[at] % total]
        base, tuned = float(flows[0][at]), float(flows[1][at])
        trusted = _trusted(source) and _trusted(target)
        name = f"{names[source][1]} -> {names[target][1]}"
        key = (names[source][0], names[target][0])
        changes.append(Change(name, key, base, tuned, _status(base, tuned, least), trusted))
    return _sorted(changes)


def _flows(side: _Side, targets: Array, sources: Array) -> Array:
    """``[pairs]`` influence that the edges between two nodes carry; 0 where there is no edge or a node is -1."""
    nodes = side.graph.n_nodes
    asked = np.where((targets >= 0) & (sources >= 0), targets * nodes + sources, -1)
    stored = (
        side.targets * nodes + side.graph.columns.numpy()
    )  # ascending: rows in order, and columns within each
    if not len(stored):
        return np.zeros(len(asked))
    at = np.minimum(np.searchsorted(stored, asked), len(stored) - 1)
    return np.where(stored[at] == asked, side.flow[at], 0.0)


def _path_changes(
    sides: tuple[_Side, _Side], names: dict[Any, tuple[str, str]], k: int, least: float
) -> list[Change]:
    found: dict[tuple[Any, ...], None] = {}
    for side in sides:
        for path in strongest_paths(side.graph, k):
            found[tuple(side.keys[node] for node in path.nodes)] = None
    changes = []
    for keys in found:
        base, tuned = (_strength(side, keys) for side in sides)
        trusted = all(_trusted(key) for key in keys)
        ids, words = zip(*(names[key] for key in keys), strict=True)
        status = _status(base, tuned, least)
        changes.append(Change(" -> ".join(words), ids, base, tuned, status, trusted))
    return _sorted(changes)


def _strength(side: _Side, keys: tuple[Any, ...]) -> float:
    """Influence that runs along one path, source first; 0 where a node or an edge is missing."""
    if any(key not in side.number for key in keys):
        return 0.0
    nodes = np.array([side.number[key] for key in keys])
    flows = _flows(side, nodes[1:], nodes[:-1])
    strength = float(side.visited[nodes[-1]])
    for node, flow in zip(nodes[1:], flows.tolist(), strict=True):
        strength *= flow / side.visited[node] if flow > 0 else 0.0
    return strength


def _supernode_changes(
    sides: tuple[_Side, _Side], names: dict[Any, tuple[str, str]], supernodes: Supernodes, least: float
) -> list[Change]:
    """Influence that enters each group from outside it."""
    by_id: dict[str, list[Any]] = {}
    for key, (node_id, _) in names.items():
        by_id.setdefault(node_id, []).append(key)
    changes = []
    for name, members in supernodes.groups.items():
        keys = [key for member in members for key in by_id.get(member, [])]
        entered = []
        for side in sides:
            inside = np.zeros(side.graph.n_nodes, bool)
            inside[[side.number[key] for key in keys if key in side.number]] = True
            crossing = inside[side.graph.columns.numpy()] & ~inside[side.targets]
            entered.append(float(side.flow[crossing].sum()))
        base, tuned = entered
        found = tuple(dict.fromkeys(names[key][0] for key in keys))
        changes.append(Change(name, found, base, tuned, _status(base, tuned, least)))
    return _sorted(changes)
