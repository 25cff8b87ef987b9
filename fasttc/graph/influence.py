"""Influence of every node on the targets, and the scores that follow from it, on sparse rows.

With ``P[t, s] = |A[t, s]| / (sum_s |A[t, s]| + remainder[t])`` and ``w`` the probabilities on the logit rows, the
influence is ``w P + w P^2 + ...``. Edges only run from lower to higher layers, so the series is one sweep over the
rows from the top layer down: each row is read once, and no power of ``P`` is ever formed. Everything is added in
float64, in a fixed order: results are bitwise the same from run to run.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fasttc.graph.graph import Graph

EDGES_PER_CHUNK = (
    1 << 18
)  # temporaries of a chunk stay within the second-level cache; 9,046 nodes: 1.6x faster than whole
MASS_FLOOR = 1e-10  # circuit-tracer's floor under a row's absolute sum

Array = np.ndarray[Any, np.dtype[Any]]


class Rows(NamedTuple):
    """Compressed rows over the nodes of a graph, as numpy views: a row is a target, a column a source."""

    row_ptr: Array  # [nodes + 1] int64
    columns: Array  # [edges] int32
    values: Array  # [edges] float32 or float64


class Scores(NamedTuple):
    """How much of the targets' influence the graph explains, each between 0 and 1 (1 = all of it).

    ``replacement``: influence of the tokens as a share of that of tokens and errors. ``completeness``: share of the
    incoming mass that is not from errors, averaged over all nodes weighted by influence, as circuit-tracer has it
    (nodes without inputs count as explained). ``completeness_rows``: the same over feature and logit nodes only.
    ``nan`` where no influence reaches a token or an error.
    """

    replacement: float
    completeness: float
    completeness_rows: float


class ScoreBounds(NamedTuple):
    """Interval that holds the scores of the graph with all its edges, stored or not."""

    lower: Scores
    upper: Scores


def chunks(row_ptr: Array, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Splits the rows ``first`` to ``last`` into runs of at most ``EDGES_PER_CHUNK`` edges (or a single row)."""
    while first < last:
        end = int(np.searchsorted(row_ptr, row_ptr[first] + EDGES_PER_CHUNK, side="right")) - 1
        end = min(max(end, first + 1), last)
        yield first, end
        first = end


def row_mass(rows: Rows) -> Array:
    """Absolute sum of each row's stored edges, ``[nodes]`` float64."""
    nodes = len(rows.row_ptr) - 1
    mass = np.zeros(nodes)
    for first, last in chunks(rows.row_ptr, 0, nodes):
        starts = rows.row_ptr[first:last]
        filled = np.flatnonzero(np.diff(rows.row_ptr[first : last + 1]))  # reduceat has no empty segments
        if filled.size:
            base = starts[0]
            edges = np.abs(rows.values[base : rows.row_ptr[last]]).astype(np.float64, copy=False)
            mass[first + filled] = np.add.reduceat(edges, starts[filled] - base)
    return mass


def sweep(rows: Rows, blocks: Sequence[tuple[int, int]], mass: Array, start: Array) -> Array:
    """One pass from the top: ``start P + start P^2 + ...`` with ``P = |values| / mass`` by row.

    Args:
        rows: edges; a row's sources must lie in blocks that come later, or be nodes without inputs.
        blocks: row ranges ``(first, last)``, top layer first.
        mass: ``[nodes]`` what each row is divided by (floored at 1e-10).
        start: ``[nodes]`` mass that is put on each node at the beginning.

    Returns:
        ``[nodes]`` float64: the mass that arrives at each node.
    """
    nodes = len(rows.row_ptr) - 1
    arrived = np.zeros(nodes)
    for top, bottom in blocks:
        scale = (arrived[top:bottom] + start[top:bottom]) / np.maximum(mass[top:bottom], MASS_FLOOR)
        for first, last in chunks(rows.row_ptr, top, bottom):
            edges = slice(rows.row_ptr[first], rows.row_ptr[last])
            counts = np.diff(rows.row_ptr[first : last + 1])
            weights = np.abs(rows.values[edges]) * np.repeat(scale[first - top : last - top], counts)
            arrived += np.bincount(rows.columns[edges], weights, minlength=nodes)
    return arrived


def rows_of(graph: "Graph") -> Rows:
    """The edges of ``graph`` as numpy views (no copy)."""
    return Rows(graph.row_ptr.numpy(), graph.columns.numpy(), graph.values.numpy())


def start_mass(graph: "Graph") -> Array:
    """``[nodes]`` float64: the probabilities on the logit rows, zero elsewhere."""
    start = np.zeros(graph.n_nodes)
    start[graph.logit_slice] = graph.logit_probs.to(torch.float64).numpy()
    return start


def total_mass(graph: "Graph") -> Array:
    """``[nodes]`` float64: absolute sum of each row, stored or not."""
    return np.add(row_mass(rows_of(graph)), graph.remainder.numpy())


def influence(graph: "Graph", mass: Array | None = None) -> Array:
    """``[nodes]`` float64 influence of each node on the targets; see ``Graph.influence``."""
    whole = total_mass(graph) if mass is None else mass
    return sweep(rows_of(graph), graph.row_blocks, whole, start_mass(graph))


def edge_flow(graph: "Graph", arrived: Array | None = None) -> Array:
    """``[edges]`` float64: influence that each stored edge carries, its share of the target's input times what visits
    the target (influence, and the probability for logits). ``arrived`` saves the pass over the edges when at hand."""
    rows, mass = rows_of(graph), total_mass(graph)
    visited = (influence(graph, mass) if arrived is None else arrived) + start_mass(graph)
    return np.abs(rows.values) * np.repeat(visited / np.maximum(mass, MASS_FLOOR), np.diff(rows.row_ptr))


def missing_mass(graph: "Graph", visited: Array, mass: Array) -> Array:
    """``[nodes]`` float64: mass that leaves each row through edges that are not stored."""
    return visited * graph.remainder.numpy() / np.maximum(mass, MASS_FLOOR)


def influence_bound(graph: "Graph") -> Tensor:
    """How much of each node's influence the unstored edges can hold; see ``Graph.influence_bound``.

    A walk visits a node at most once, so a node gets at most the missing mass of all rows of higher layers.
    """
    mass = total_mass(graph)
    missing = missing_mass(graph, influence(graph, mass) + start_mass(graph), mass)
    layer = graph.node_layer.numpy() + 1  # tokens 0, layer l is l + 1, logits n_layers + 1
    by_layer = np.bincount(layer, missing, minlength=graph.n_layers + 2)
    above = np.concatenate([np.cumsum(by_layer[::-1])[::-1][1:], [0.0]])
    return torch.from_numpy(above[layer])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


class _Sums(NamedTuple):
    tokens: float
    errors: float
    visited: float
    visited_rows: float


def _sums(graph: "Graph", arrived: Array) -> _Sums:
    visited = arrived + start_mass(graph)
    rows = float(visited[graph.feature_slice].sum() + visited[graph.logit_slice].sum())
    tokens, errors = float(arrived[graph.token_slice].sum()), float(arrived[graph.error_slice].sum())
    return _Sums(tokens, errors, float(visited.sum()), rows)


def scores(graph: "Graph", arrived: Array) -> Scores:
    """Scores from the influence ``[nodes]``.

    ``sum_t (1 - share of errors in row t) visited[t] = sum_t visited[t] - influence(errors)``: no second look at the
    edges is needed.
    """
    sums = _sums(graph, arrived)
    return Scores(
        replacement=_ratio(sums.tokens, sums.tokens + sums.errors),
        completeness=1 - _ratio(sums.errors, sums.visited),
        completeness_rows=1 - _ratio(sums.errors, sums.visited_rows),
    )


def score_bounds(graph: "Graph", arrived: Array | None = None) -> ScoreBounds:
    """Interval of the scores when the unstored mass may go anywhere; see ``Graph.score_bounds``.

    Lower end: all of it enters errors at once. Upper end: it reaches tokens, visiting every layer on its way.
    """
    mass = total_mass(graph)
    if arrived is None:
        arrived = influence(graph, mass)
    missing = missing_mass(graph, arrived + start_mass(graph), mass)
    sums, lost = _sums(graph, arrived), float(missing.sum())
    below = missing * np.maximum(graph.node_layer.numpy(), 0)  # features that missing mass can still visit
    most = float(below.sum())
    reached = sums.tokens + sums.errors + lost
    return ScoreBounds(
        lower=Scores(
            replacement=_ratio(sums.tokens, reached),
            completeness=1 - _ratio(sums.errors + lost, sums.visited + lost),
            completeness_rows=1 - _ratio(sums.errors + lost, sums.visited_rows),
        ),
        upper=Scores(
            replacement=_ratio(sums.tokens + lost, reached),
            completeness=1 - _ratio(sums.errors, sums.visited + lost + most),
            completeness_rows=1 - _ratio(sums.errors, sums.visited_rows + most),
        ),
    )
