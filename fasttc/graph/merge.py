"""Supernodes: found by clustering within bounds of the measured loss, or taken from a file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasttc.graph.export import node_ids
from fasttc.graph.graph import Graph
from fasttc.graph.influence import Array, Scores
from fasttc.graph.merged import MergedGraph, merged_graph
from fasttc.graph.pruned import PrunedGraph
from fasttc.graph.quotient import (
    Edges,
    edges_kept,
    edges_of,
    quotient,
    quotient_influence,
    quotient_scores,
    sign_agreement,
)
from fasttc.graph.similarity import APART, check_evidence, distances
from fasttc.graph.supernodes import Supernodes

_GRID = 16  # cuts of the tree that are measured before the search closes in on one
_MOST_NODES = 20_000  # their distances take 1.6 GB
_PAIRWISE = 2_000  # nodes; in graphs of at most so many, groups of the best cut merge further, pair by pair
_PAIRS_TRIED = 500


@dataclass(frozen=True)
class MergeBounds:
    """What merging may cost: least values of the measured loss (``MergeLoss``), 0 to 1.

    Attributes:
        completeness: share of the pruned graph's completeness that is kept.
        sign_agreement: agreement of signs within supernodes.
        edges: ``sum |summed edge| / sum |edge|``.
    """

    completeness: float = 0.9
    sign_agreement: float = 0.92
    edges: float = 0.83

    def __post_init__(self) -> None:
        for name in ("completeness", "sign_agreement", "edges"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {value}")

    def met(self, edges: Edges, group: Array, pruned: Scores) -> bool:
        """Whether a grouping's loss is within the bounds; not where nothing runs between groups (``nan``).

        What :func:`fasttc.graph.quotient.merge_loss` measures, the cheapest figure first and no more than is needed.

        Args:
            edges: of the pruned graph; group: number of each node's group, -1 outside.
            pruned: scores of that graph.
        """
        merged = quotient(edges, group)
        if not edges_kept(merged) >= self.edges:
            return False
        scores = quotient_scores(merged, quotient_influence(merged))
        if not scores.completeness >= self.completeness * pruned.completeness:
            return False
        return sign_agreement(edges, group) >= self.sign_agreement


def merge(
    graph: Graph | PrunedGraph,
    *,
    supernodes: int | None = None,
    bounds: MergeBounds | None = None,
    evidence: Sequence[Any] = (),
) -> MergedGraph:
    """Merges nodes that play the same part, as far as the loss allows.

    Complete-link clustering on the distances of :func:`fasttc.graph.similarity.distances`: every two members of a
    supernode are alike. The tree is cut where the fewest supernodes are left with the measured loss within ``bounds``
    (a grid of cuts, then bisection below the best); in graphs of at most 2,000 nodes, supernodes of the best cut merge
    further, closest pairs first, as long as the loss stays within ``bounds``. Or it is cut where ``supernodes`` are
    left. Only nodes of one kind and owner merge; logits stay, and nodes without an edge are left out.

    Args:
        graph: a pruned graph, or a graph, which is pruned at 0.8 / 0.98.
        supernodes: how many to leave (more where fewer would mix kinds); None: as few as the bounds allow.
        bounds: of the loss, ``MergeBounds()`` by default; not looked at when ``supernodes`` is given.
        evidence: arrays ``[features of the pruned graph's compact form, any]`` whose rows say what a feature is:
            decoder rows, encoder rows, activations on a corpus. The cosine of two rows counts as much as that of
            an edge profile.

    Returns:
        The merged graph; ``.loss`` says what it cost. Deterministic.

    Raises:
        ValueError: bounds outside 0 to 1, evidence of another shape, fewer than one supernode, more than 20,000
            connected nodes.
    """
    if supernodes is not None and supernodes < 1:
        raise ValueError(f"supernodes: expected at least 1, got {supernodes}")
    pruned = (graph.prune() if isinstance(graph, Graph) else graph).compact()
    edges, rows = edges_of(pruned), check_evidence(pruned.graph, evidence)
    nodes = np.union1d(edges.targets, edges.sources)
    if len(nodes) > _MOST_NODES:
        raise ValueError(
            f"graph: expected at most {_MOST_NODES:,} connected nodes to merge, got {len(nodes):,}: prune first"
        )
    group = np.full(pruned.graph.n_nodes, -1)
    group[nodes] = np.arange(len(nodes))
    if len(nodes) > 1:
        tree = _Tree(distances(pruned.graph, edges, nodes, rows))
        if supernodes is None:
            group[nodes] = _fewest(tree, pruned, edges, nodes, bounds or MergeBounds())
        else:
            group[nodes] = tree.cut(max(supernodes, tree.fewest))
    return merged_graph(pruned, group)


def merge_by(graph: Graph | PrunedGraph, supernodes: Supernodes) -> tuple[MergedGraph, list[str]]:
    """Merges what a file says; every other connected node stays on its own.

    Args:
        graph: a pruned graph, or a graph, which is pruned at 0.8 / 0.98.
        supernodes: groups by node id.

    Returns:
        The merged graph, and the ids in groups that it does not have.

    Raises:
        ValueError: a group of errors and other nodes; groups of which no member is in the graph at all.
    """
    pruned = (graph.prune() if isinstance(graph, Graph) else graph).compact()
    kept = pruned.node_mask.nonzero().squeeze(1).tolist()
    number = dict(zip(node_ids(pruned.graph, pruned.node_mask), kept, strict=True))
    edges = edges_of(pruned)
    group = np.full(pruned.graph.n_nodes, -1)
    nodes = np.union1d(edges.targets, edges.sources)
    group[nodes] = nodes
    names, missing = {}, []
    for at, (name, members) in enumerate(supernodes.groups.items()):
        found = [number[member] for member in members if member in number]
        missing += [member for member in members if member not in number]
        if found:
            group[found] = pruned.graph.n_nodes + at
            names[pruned.graph.n_nodes + at] = name
    if supernodes.groups and not names:
        raise ValueError(f"groups: expected nodes of this graph, got none of it (for one, {missing[0]!r})")
    return merged_graph(pruned, group, names), missing


class _Tree:
    """The merges of complete-link clustering, from the closest pair on."""

    def __init__(self, condensed: Array) -> None:
        from scipy.cluster.hierarchy import linkage

        self.condensed = condensed
        steps = linkage(condensed, "complete")
        self.n = len(steps) + 1
        self._pairs = steps[:, :2].astype(np.int64)
        self.fewest = self.n - int((steps[:, 2] < APART).sum())

    def cut(self, groups: int) -> Array:
        """``[n]`` group of each node when ``groups`` are left."""
        steps = max(self.n - groups, 0)
        parent = np.arange(self.n + steps)
        for step, (left, right) in enumerate(self._pairs[:steps]):
            parent[left] = parent[right] = self.n + step
        while True:
            above = parent[parent]
            if np.array_equal(above, parent):
                return np.unique(parent[: self.n], return_inverse=True)[1]
            parent = above


def _fewest(tree: _Tree, pruned: PrunedGraph, edges: Edges, nodes: Array, bounds: MergeBounds) -> Array:
    """The fewest groups that were found within the bounds: the best cut, then single merges beyond it."""
    scores, group = pruned.scores(), np.full(pruned.graph.n_nodes, -1)

    def within(numbers: Array) -> bool:
        group[nodes] = numbers
        return bounds.met(edges, group, scores)

    grid = np.unique(np.geomspace(tree.fewest, tree.n, _GRID).round().astype(int)).tolist()
    at = next((i for i, groups in enumerate(grid) if within(tree.cut(groups))), len(grid) - 1)
    best, below = grid[at], grid[at - 1] if at else grid[at]
    while best - below > 1:
        middle = (best + below) // 2
        if within(tree.cut(middle)):
            best = middle
        else:
            below = middle
    found = tree.cut(best)
    return found if tree.n > _PAIRWISE else _pair_by_pair(found, tree.condensed, within)


def _pair_by_pair(group: Array, condensed: Array, within: Callable[[Array], bool]) -> Array:
    """Merges on, closest groups first (complete link), past pairs that break the bounds and all that would hold them.

    A cut ends where the tree's next merge costs too much; merges elsewhere may still be free.
    """
    from scipy.spatial.distance import squareform

    order = np.argsort(group, kind="stable")
    first = np.searchsorted(group[order], np.arange(int(group.max()) + 1))
    apart = squareform(condensed)[np.ix_(order, order)]
    link = np.maximum.reduceat(np.maximum.reduceat(apart, first, 0), first, 1)
    np.fill_diagonal(link, APART)
    for _ in range(_PAIRS_TRIED):
        one, other = np.unravel_index(link.argmin(), link.shape)
        if link[one, other] >= APART:
            break
        tried = np.where(group == other, one, group)
        if within(np.unique(tried, return_inverse=True)[1]):
            group = tried
            link[one] = link[:, one] = np.maximum(link[one], link[other])
            link[other] = link[:, other] = link[one, one] = APART
        else:
            link[one, other] = link[other, one] = APART
    return np.unique(group, return_inverse=True)[1]
