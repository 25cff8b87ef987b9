"""Paths of influence: the strongest ones, how much arrives by their length, and how much passes through a set of nodes.

The strength of a path is the product of its edges' shares ``P[t, s] = |A[t, s]| / row mass`` (``Graph.influence``), so
the strengths of all paths from a logit to a node sum up to the node's influence per probability of that logit.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fasttc.graph.graph import Graph
from fasttc.graph.influence import (
    EDGES_PER_CHUNK,
    MASS_FLOOR,
    Array,
    Rows,
    chunks,
    rows_of,
    start_mass,
    sweep,
    total_mass,
)
from fasttc.graph.pruned import PrunedGraph


@dataclass(frozen=True)
class Path:
    """A path from a source up to a logit.

    Attributes:
        nodes: node numbers, source first, logit last.
        strength: product of the edges' shares of their targets' whole input, 0 to 1.
        sign: +1 or -1: product of the edges' signs.
    """

    nodes: tuple[int, ...]
    strength: float
    sign: int


@dataclass(frozen=True)
class LengthProfile:
    """Influence that arrives after exactly n edges, ``w P^n``, divided by the probability of the logits it comes from.

    Attributes:
        features, errors, tokens: by kind of the node it arrives at; entry n - 1 is for n edges. Tokens and errors are
            ends: ``sum(tokens) + sum(errors) + sum(missing)`` is 1 up to rounding where every feature has inputs.
        missing: what left, in the n-th step, through edges that are not stored.
    """

    features: list[float]
    errors: list[float]
    tokens: list[float]
    missing: list[float]

    def mean_length(self) -> float:
        """Mean number of edges of the paths that end in tokens, weighted by influence."""
        total = sum(self.tokens)
        return sum((n + 1) * share for n, share in enumerate(self.tokens)) / total if total else float("nan")


class _Walk(NamedTuple):
    """What the searches need: edges, ranges of rows from the top, and what a row is divided by."""

    rows: Rows
    blocks: list[tuple[int, int]]
    mass: Array


def whole_graph(graph: Graph | PrunedGraph) -> Graph:
    """The graph that paths run in: of a pruned one, the kept part, where dropped mass is a remainder."""
    return graph if isinstance(graph, Graph) else graph.compact().graph


def strongest_paths(
    graph: Graph | PrunedGraph,
    k: int = 10,
    *,
    logit: int = 0,
    sources: Iterable[int] | None = None,
    through: Iterable[int] | None = None,
    avoiding: Iterable[int] = (),
) -> list[Path]:
    """The ``k`` strongest paths from sources to a logit. Exact: no path that is left out is stronger.

    One sweep from below finds the strongest way from the sources to each node; a best-first search from the logit then
    follows only beginnings of paths that are among the ``k`` best. Equal strengths are ordered by node numbers from
    the logit down.

    Args:
        graph: a graph or a pruned graph; node numbers are those of :func:`whole_graph`.
        k: how many; fewer are returned if there are fewer.
        logit: which one, in the order of the graph.
        sources: nodes where paths begin, the tokens by default.
        through: paths must pass at least one of these nodes (ends count); None: no such rule.
        avoiding: paths must not pass any of these nodes.

    Returns:
        Paths by falling strength. Deterministic.

    Raises:
        ValueError: ``k`` below 1, a logit or a node that does not exist.
    """
    graph = whole_graph(graph)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    target = _logit_node(graph, logit)
    walk = _Walk(rows_of(graph), graph.row_blocks, total_mass(graph))
    begin = _mask(
        graph, "sources", range(*graph.token_slice.indices(graph.n_nodes)) if sources is None else sources
    )
    barred = _mask(graph, "avoiding", avoiding)
    best = _best_from_below(walk, np.where(begin & ~barred, 1.0, 0.0), ~barred)
    needed = None if through is None else _mask(graph, "through", through)
    # Strength of the best way to each node that has met the rule, and (if there is one) that has not met it yet.
    states = [best] if needed is None else [best, _best_through(walk, best, needed)]
    found = _best_first(walk, states, needed, begin & ~barred, target)
    return [path for path, _ in zip(found, range(k), strict=False)]


def _logit_node(graph: Graph, logit: int) -> int:
    if not 0 <= logit < graph.n_logits:
        raise ValueError(f"logit: expected a number from 0 to {graph.n_logits - 1}, got {logit}")
    return graph.logit_slice.start + logit


def _start(graph: Graph, logit: int | None) -> Array:
    """``[nodes]``: 1 at one logit, or the probabilities of all."""
    if logit is None:
        return start_mass(graph)
    start = np.zeros(graph.n_nodes)
    start[_logit_node(graph, logit)] = 1.0
    return start


def _mask(graph: Graph, name: str, nodes: Iterable[int]) -> Array:
    mask = np.zeros(graph.n_nodes, bool)
    for node in nodes:
        if not 0 <= node < graph.n_nodes:
            raise ValueError(f"{name}: expected node numbers below {graph.n_nodes}, got {node}")
        mask[node] = True
    return mask


def _row_best(walk: _Walk, value: Array, first: int, last: int) -> Array:
    """``max_s P[t, s] value[s]`` of the rows ``first`` to ``last``."""
    best = np.zeros(last - first)
    ptr = walk.rows.row_ptr
    for top, bottom in chunks(ptr, first, last):
        filled = top + np.flatnonzero(np.diff(ptr[top : bottom + 1]))
        if filled.size:
            edges = slice(ptr[top], ptr[bottom])
            arriving = np.abs(walk.rows.values[edges]) * value[walk.rows.columns[edges]]
            best[filled - first] = np.maximum.reduceat(arriving, ptr[filled] - ptr[top])
    return best / np.maximum(walk.mass[first:last], MASS_FLOOR)


def _best_from_below(walk: _Walk, start: Array, allowed: Array) -> Array:
    """``[nodes]``: strength of the strongest path from the start nodes to each node; 0 where there is none."""
    best = start.copy()
    for first, last in reversed(walk.blocks):
        arriving = np.where(allowed[first:last], _row_best(walk, best, first, last), 0.0)
        best[first:last] = np.maximum(best[first:last], arriving)
    return best


def _best_through(walk: _Walk, best: Array, needed: Array) -> Array:
    """``[nodes]``: the same over paths that pass a needed node; ``best`` is zero at barred nodes already."""
    through = np.where(needed, best, 0.0)
    for first, last in reversed(walk.blocks):
        arriving = np.where(best[first:last] > 0, _row_best(walk, through, first, last), 0.0)
        through[first:last] = np.where(needed[first:last], best[first:last], arriving)
    return through


def _best_first(
    walk: _Walk, states: list[Array], needed: Array | None, begin: Array, target: int
) -> Iterator[Path]:
    """Paths from ``target`` down by falling strength.

    An entry of the heap is the upper part of a path with the strength of its best completion, which is exact; so the
    entry on top is a part of the best path that is left. ``open`` is 1 while a needed node is still to be met.
    """
    still = 0 if needed is None or needed[target] else 1
    heap: list[tuple[float, tuple[int, ...], float, int, int, bool]] = []
    if states[still][target] > 0:
        heap.append((-states[still][target], (target,), 1.0, 1, still, False))
    while heap:
        _, nodes, strength, sign, still, done = heapq.heappop(heap)
        if done:
            yield Path(nodes[::-1], strength, sign)
            continue
        node = nodes[-1]
        if begin[node] and not still:
            heapq.heappush(heap, (-strength, nodes, strength, sign, 0, True))
        edges = slice(walk.rows.row_ptr[node], walk.rows.row_ptr[node + 1])
        sources, values = walk.rows.columns[edges], walk.rows.values[edges].astype(np.float64)
        shares = np.abs(values) / max(walk.mass[node], MASS_FLOOR)
        for source, share, value in zip(sources.tolist(), shares.tolist(), values.tolist(), strict=True):
            below = still if needed is None or not needed[source] else 0
            promise = strength * share * states[below][source]
            if promise > 0:
                way = sign if value > 0 else -sign
                heapq.heappush(heap, (-promise, (*nodes, source), strength * share, way, below, False))


def length_profile(graph: Graph | PrunedGraph, logit: int | None = None) -> LengthProfile:
    """Influence by the number of edges, ``w P^n`` for every n; see ``LengthProfile``. Deterministic.

    Args:
        graph: a graph or a pruned graph.
        logit: of this logit alone; None: of all, with their probabilities.

    Raises:
        ValueError: a logit that does not exist.
    """
    graph = whole_graph(graph)
    rows, mass = rows_of(graph), np.maximum(total_mass(graph), MASS_FLOOR)
    step = _start(graph, logit)
    step /= step.sum()
    missing = graph.remainder.numpy() / mass
    found: dict[str, list[float]] = {"features": [], "errors": [], "tokens": [], "missing": []}
    places = {"features": graph.feature_slice, "errors": graph.error_slice, "tokens": graph.token_slice}
    for _ in range(graph.n_layers + 1):
        lost, step = float(step @ missing), _step(rows, step / mass)
        if not step.any() and not lost:
            break
        found["missing"].append(lost)
        for name, place in places.items():
            found[name].append(float(step[place].sum()))
    return LengthProfile(**found)


def _step(rows: Rows, scaled: Array) -> Array:
    """``[nodes]``: ``sum_t scaled[t] |A[t, s]|``."""
    arrived = np.zeros(len(scaled))
    for first, last in chunks(rows.row_ptr, 0, len(scaled)):
        edges = slice(rows.row_ptr[first], rows.row_ptr[last])
        counts = np.diff(rows.row_ptr[first : last + 1])
        weights = np.abs(rows.values[edges]) * np.repeat(scaled[first:last], counts)
        arrived += np.bincount(rows.columns[edges], weights, len(scaled))
    return arrived


def influence_avoiding(graph: Graph | PrunedGraph, nodes: Iterable[int], logit: int | None = None) -> Array:
    """``[nodes]`` float64 influence that arrives along paths that pass none of ``nodes``; 0 at these.

    Args:
        graph: a graph or a pruned graph; node numbers are those of :func:`whole_graph`.
        nodes: what the paths avoid.
        logit: of this logit alone, with weight 1; None: of all, with their probabilities.

    Raises:
        ValueError: a node or a logit that does not exist.
    """
    graph = whole_graph(graph)
    barred, start = _mask(graph, "nodes", nodes), _start(graph, logit)
    start[barred] = 0.0
    rows = rows_of(graph)
    values = np.empty_like(rows.values)
    for first in range(0, len(values), EDGES_PER_CHUNK):
        part = slice(first, first + EDGES_PER_CHUNK)
        values[part] = np.where(barred[rows.columns[part]], 0, rows.values[part])
    return sweep(rows._replace(values=values), graph.row_blocks, total_mass(graph), start)
