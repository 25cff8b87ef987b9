"""A graph whose nodes are grouped: edges between groups in two meanings, and what grouping loses.

Numbers only: edges as arrays and a group number per node. ``fasttc.graph.merged`` gives them names and files.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from fasttc.graph.influence import MASS_FLOOR, Array, Scores, influence, start_mass
from fasttc.graph.pruned import PrunedGraph

_MAX_STEPS = 10_000  # of influence in a grouped graph; cycles among groups make it a series, which dies out
_FADED = 1e-13


class Edges(NamedTuple):
    """The kept edges of a pruned graph and what a quotient needs to know of its nodes."""

    targets: Array  # [edges] int64
    sources: Array  # [edges] int64
    weights: Array  # [edges] float64, signed
    remainder: Array  # [nodes] float64: mass of each row that is not among the edges
    kind: Array  # [nodes] int8
    start: Array  # [nodes] float64: probabilities of the logits
    flow: Array  # [edges] float64: influence that each edge carries


class Quotient(NamedTuple):
    """Edges between groups, by target group and then source group; none within a group."""

    targets: Array  # [m] int64 group numbers
    sources: Array  # [m]
    normalised: Array  # [m] float64: signed share of the target group's outside input
    additive: Array  # [m] float64: sum of the signed weights between the two groups
    absolute: Array  # [m] float64: sum of the absolute weights
    flow: Array  # [m] float64: influence that the edges carried
    filled: Array  # [groups] bool: has inputs
    kind: Array  # [groups] int8
    start: Array  # [groups] float64


@dataclass(frozen=True)
class MergeLoss:
    """What grouping did to a pruned graph. Shares are between 0 and 1; 1 = nothing was lost.

    Attributes:
        nodes_before, nodes_after: nodes in groups, and groups. Tokens and logits without an edge are in none, unless a
            file puts them there.
        pruned, merged: scores of the pruned graph and of the grouped one, in which everything that pruning dropped
            and everything that cancels in a group counts as unexplained.
        completeness_kept, replacement_kept: ``merged`` over ``pruned``.
        influence_kept: overlap of the influence that reaches each group from outside in both graphs:
            ``sum min(before, after) / sum before``.
        sign_agreement: within the groups of at least two members, the share of the absolute weight of their edges
            with one outside node that has the majority's sign. Pairs of a group and a node with one edge only do not
            count.
        edges_kept: ``sum |summed edge| / sum |edge|`` over the edges that run between groups.
        internal: share of the absolute weight that runs within groups and is not shown.
    """

    nodes_before: int
    nodes_after: int
    pruned: Scores
    merged: Scores
    completeness_kept: float
    replacement_kept: float
    influence_kept: float
    sign_agreement: float
    edges_kept: float
    internal: float

    def to_dict(self) -> dict[str, float | int | dict[str, float]]:
        return {**asdict(self), "pruned": self.pruned._asdict(), "merged": self.merged._asdict()}


def edges_of(pruned: PrunedGraph) -> Edges:
    """The kept edges of a pruned graph in its compact form (``pruned.compact()``), with the influence they carry."""
    graph = pruned.graph
    targets, sources, values = (tensor.numpy() for tensor in pruned.edges())
    weights, remainder = values.astype(np.float64), graph.remainder.numpy()
    start = start_mass(graph)
    mass = np.bincount(targets, np.abs(weights), graph.n_nodes) + remainder
    visited = (influence(graph, mass) + start) / np.maximum(mass, MASS_FLOOR)
    kind = graph.node_kind.numpy()
    return Edges(targets, sources, weights, remainder, kind, start, np.abs(weights) * visited[targets])


def quotient(edges: Edges, group: Array) -> Quotient:
    """Edges between groups.

    The normalised edge is that of the attribution-graph frontend: a member ``t`` of the target group weighs in with
    the share ``f_t`` of its input that comes from outside the group, and its edges are shares of that input::

        edge(S -> T) = sum_t  f_t / sum_T f  *  sum_{s in S} w[t, s] / outside input of t

    The outside input includes what pruning dropped (the frontend does not know that part), so the absolute row sums
    of the normalised edges are below 1 by what was dropped and by what cancels.

    Args:
        edges: of the pruned graph.
        group: ``[nodes]`` int64 group of each node, 0 to groups - 1; -1 for nodes without edges.
    """
    nodes, groups = len(group), int(group.max(initial=-1)) + 1
    outer = group[edges.targets] != group[edges.sources]
    inner_targets, inner_weights = edges.targets[~outer], np.abs(edges.weights[~outer])
    targets, sources, weights = edges.targets[outer], edges.sources[outer], edges.weights[outer]
    outside = np.bincount(targets, np.abs(weights), nodes) + edges.remainder
    whole = outside + np.bincount(inner_targets, inner_weights, nodes)
    grouped = group >= 0
    fraction = np.where(grouped, outside / np.maximum(whole, MASS_FLOOR), 0.0)
    total = np.bincount(group[grouped], fraction[grouped], groups)
    scale = np.zeros(nodes)
    scale[grouped] = fraction[grouped] / np.maximum(total[group[grouped]], MASS_FLOOR)
    scale /= np.maximum(outside, MASS_FLOOR)

    key = group[targets] * groups + group[sources]
    pairs, pair = _numbered(key, groups * groups)

    def summed(values: Array) -> Array:
        return np.bincount(pair, values, len(pairs))

    kind = np.zeros(groups, np.int8)
    kind[group[grouped]] = edges.kind[grouped]
    return Quotient(
        targets=pairs // max(groups, 1),
        sources=pairs % max(groups, 1),
        normalised=summed(scale[targets] * weights),
        additive=summed(weights),
        absolute=summed(np.abs(weights)),
        flow=summed(edges.flow[outer]),
        filled=np.bincount(group[grouped], whole[grouped], groups) > 0,
        kind=kind,
        start=np.bincount(group[grouped], edges.start[grouped], groups),
    )


def quotient_influence(merged: Quotient) -> Array:
    """``[groups]`` float64 influence in the grouped graph: ``w P + w P^2 + ...`` with ``P`` the absolute normalised
    edges. Groups may feed each other; as every walk leaks into tokens, errors or cancellation, the series ends."""
    groups, shares = len(merged.start), np.abs(merged.normalised)
    arrived, step = np.zeros(groups), merged.start
    for _ in range(_MAX_STEPS):
        step = np.bincount(merged.sources, step[merged.targets] * shares, groups)
        arrived += step
        if step.sum() <= _FADED:
            break
    return arrived


def quotient_scores(merged: Quotient, arrived: Array) -> Scores:
    """Scores of a grouped graph: the mass that its normalised edges do not carry on counts as unexplained."""
    feature, error, token, logit = range(4)
    visited = arrived + merged.start
    carried = np.bincount(merged.targets, np.abs(merged.normalised), len(visited))
    lost = float((visited * np.maximum(1 - carried, 0))[merged.filled].sum())
    errors, tokens = float(arrived[merged.kind == error].sum()), float(arrived[merged.kind == token].sum())
    rows = float(visited[(merged.kind == feature) | (merged.kind == logit)].sum())
    return Scores(
        replacement=_ratio(tokens, tokens + errors + lost),
        completeness=1 - _ratio(errors + lost, float(visited.sum()) + lost),
        completeness_rows=1 - _ratio(errors + lost, rows),
    )


def sign_agreement(edges: Edges, group: Array) -> float:
    """See ``MergeLoss``; 1 where no group shares an outside node."""
    size = np.bincount(group[group >= 0], minlength=1)
    agreed = total = 0.0
    for inside, outside in ((edges.sources, edges.targets), (edges.targets, edges.sources)):
        seen = (group[inside] != group[outside]) & (size[group[inside]] > 1)
        key = group[inside[seen]] * len(group) + outside[seen]
        weights = edges.weights[seen]
        _, pair = _numbered(key, len(size) * len(group))
        count = np.bincount(pair)
        positive = np.bincount(pair, np.maximum(weights, 0), len(count))
        negative = np.bincount(pair, np.maximum(-weights, 0), len(count))
        shared = count > 1
        agreed += float(np.maximum(positive, negative)[shared].sum())
        total += float((positive + negative)[shared].sum())
    return agreed / total if total > 0 else 1.0


def merge_loss(edges: Edges, group: Array, pruned: Scores) -> MergeLoss:
    """What grouping loses; ``pruned`` are the scores of the pruned graph."""
    merged = quotient(edges, group)
    arrived = quotient_influence(merged)
    scores = quotient_scores(merged, arrived)
    entered = np.bincount(merged.sources, merged.flow, len(arrived))
    everything, between = float(np.abs(edges.weights).sum()), float(merged.absolute.sum())
    return MergeLoss(
        nodes_before=int((group >= 0).sum()),
        nodes_after=len(arrived),
        pruned=pruned,
        merged=scores,
        completeness_kept=_ratio(scores.completeness, pruned.completeness),
        replacement_kept=_ratio(scores.replacement, pruned.replacement),
        influence_kept=_ratio(float(np.minimum(entered, arrived).sum()), float(entered.sum())),
        sign_agreement=sign_agreement(edges, group),
        edges_kept=edges_kept(merged),
        internal=1 - _ratio(between, everything),
    )


def edges_kept(merged: Quotient) -> float:
    """See ``MergeLoss``."""
    return _ratio(float(np.abs(merged.additive).sum()), float(merged.absolute.sum()))


def _numbered(key: Array, size: int) -> tuple[Array, Array]:
    """``np.unique(key, return_inverse=True)`` for keys below ``size``; without sorting where the keys are dense."""
    if size > 16 * len(key):
        return np.unique(key, return_inverse=True)
    present = np.zeros(size, bool)
    present[key] = True
    return np.flatnonzero(present), (np.cumsum(present) - 1)[key]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
