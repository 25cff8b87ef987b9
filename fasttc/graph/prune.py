"""Pruning by cumulative influence: the nodes, then the edges, that carry a given share; then dead ends go.

The rule is circuit-tracer's (methods.md 6.4), computed on sparse rows. Nothing is sorted that need not be: nodes are
few, and the threshold of the edges is found by a weighted histogram over the leading bits of the scores, followed by a
sort of the one bin that holds it. Deterministic, bitwise the same from run to run.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from fasttc.graph._select import share_threshold
from fasttc.graph.influence import (
    MASS_FLOOR,
    Array,
    Rows,
    chunks,
    row_mass,
    rows_of,
    scores,
    start_mass,
    sweep,
    total_mass,
)
from fasttc.graph.pruned import PrunedGraph

if TYPE_CHECKING:
    from fasttc.graph.graph import Graph


class _Kept(NamedTuple):
    """Edges among kept nodes, in the numbering of the whole graph, and where they are stored there."""

    rows: Rows
    stored_at: Array  # [kept] positions in the stored edges


def _edges_among(rows: Rows, keep: Array) -> _Kept:
    """The edges whose two ends are kept. Rows of dropped nodes are not read."""
    nodes = len(rows.row_ptr) - 1
    lengths = np.where(keep, np.diff(rows.row_ptr), 0)
    # Positions within the kept rows laid end to end, so that a chunk holds a bounded number of edges.
    laid = np.concatenate([[0], np.cumsum(lengths)])
    place = np.int32 if len(rows.values) < 2**31 else np.int64
    counts, columns, values, stored_at = np.zeros(nodes, np.int64), [], [], []
    for first, last in chunks(laid, 0, nodes):
        shift = np.repeat(rows.row_ptr[first:last] - laid[first:last], lengths[first:last])
        at = np.arange(laid[first], laid[last]) + shift
        sources = rows.columns[at]
        both = keep[sources]
        at, owner = at[both], np.repeat(np.arange(first, last), lengths[first:last])[both]
        counts[first:last] = np.bincount(owner - first, minlength=last - first)
        columns.append(sources[both])
        values.append(rows.values[at])
        stored_at.append(at.astype(place))
    row_ptr = np.concatenate([[0], np.cumsum(counts)])
    return _Kept(Rows(row_ptr, np.concatenate(columns), np.concatenate(values)), np.concatenate(stored_at))


def _edge_scores(rows: Rows, scale: Array) -> Array:
    """``|value| * scale[row]`` of every edge, float64."""
    out = np.empty(len(rows.values))
    for first, last in chunks(rows.row_ptr, 0, len(rows.row_ptr) - 1):
        edges = slice(rows.row_ptr[first], rows.row_ptr[last])
        counts = np.diff(rows.row_ptr[first : last + 1])
        np.multiply(np.abs(rows.values[edges]), np.repeat(scale[first:last], counts), out=out[edges])
    return out


def _drop_dead_ends(graph: "Graph", keep: Array, kept: _Kept, chosen: Array) -> tuple[Array, Array]:
    """Drops features and errors without outgoing and features without incoming edges until nothing changes.

    Returns:
        The final node mask and the stored positions of the final edges.
    """
    at = np.flatnonzero(chosen)
    targets = (np.searchsorted(kept.rows.row_ptr, at, side="right") - 1).astype(np.int32)
    sources, stored_at = kept.rows.columns[at], kept.stored_at[at]
    inner, features = graph.error_slice.stop, graph.n_features
    while True:
        has_output, has_input = np.zeros_like(keep), np.zeros_like(keep)
        has_output[sources] = True
        has_input[targets] = True
        alive = keep.copy()
        alive[:inner] &= has_output[:inner]
        alive[:features] &= has_input[:features]
        if np.array_equal(alive, keep):
            return keep, stored_at
        keep = alive
        stays = keep[targets] & keep[sources]
        targets, sources, stored_at = targets[stays], sources[stays], stored_at[stays]


def cumulative_share(influence: Array) -> Array:
    """``[nodes]``: share of all influence held by the nodes down to each one, in descending order."""
    order = np.argsort(-influence, kind="stable")
    total = influence.sum()
    out = np.ones_like(influence)
    if total > 0:
        out[order] = np.cumsum(influence[order]) / total
    return out


def prune(graph: "Graph", node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PrunedGraph:
    """Keeps the most influential nodes, then the edges among them, then removes dead ends.

    Nodes: kept from the highest influence down to the score at which the cumulative share reaches ``node_threshold``;
    tokens and logits always. Edges: on the matrix of the kept nodes, with rows normalised anew, an edge scores
    ``|share| * (influence + w)[target]`` and is kept down to the score at which ``edge_threshold`` is reached. Then
    features and errors without a kept outgoing edge and features without a kept incoming edge go, until nothing
    changes.

    Edges that are not stored count in the influence of the whole graph (``remainder``) but are not in the pruned one.
    With the largest edges stored to a share of 0.99 of each row, on a synthetic graph of 9,046 nodes and 17 M edges,
    98.6 % of the nodes and 92 % of the edges were those of the exact graph, and every edge kept was one of those.

    Args:
        graph: the graph.
        node_threshold: share of the nodes' influence, 0 to 1; at 1 every node with influence is kept.
        edge_threshold: share of the edges' scores, 0 to 1.

    Returns:
        Masks over ``graph``, the influence, and the scores of the whole graph.

    Raises:
        ValueError: a threshold outside 0 to 1.
    """
    for name, share in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected a share from 0 to 1, got {share}")
    whole, start = rows_of(graph), start_mass(graph)
    influence = sweep(whole, graph.row_blocks, total_mass(graph), start)
    keep = influence >= share_threshold(influence, node_threshold)
    keep[graph.token_slice.start :] = True

    kept = _edges_among(whole, keep)
    kept_mass = row_mass(kept.rows)
    visited = sweep(kept.rows, graph.row_blocks, kept_mass, start) + start
    scored = _edge_scores(kept.rows, visited / np.maximum(kept_mass, MASS_FLOOR))
    chosen = scored >= share_threshold(scored, edge_threshold)
    node_mask, stored_at = _drop_dead_ends(graph, keep, kept, chosen)
    edge_mask = np.zeros(graph.n_edges, dtype=bool)
    edge_mask[stored_at] = True
    return PrunedGraph(
        graph=graph,
        node_threshold=float(node_threshold),
        edge_threshold=float(edge_threshold),
        node_mask=torch.from_numpy(node_mask),
        edge_mask=torch.from_numpy(edge_mask),
        influence=torch.from_numpy(influence),
        cumulative=torch.from_numpy(cumulative_share(influence)),
        full_scores=scores(graph, influence),
    )
