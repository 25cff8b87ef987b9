"""How alike two nodes of a pruned graph are, for merging: by their edges, and by evidence from elsewhere."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fasttc.graph.graph import FEATURE, LOGIT, Graph
from fasttc.graph.influence import MASS_FLOOR, Array
from fasttc.graph.quotient import Edges

APART = 4.0
"""Distance of nodes that never merge; all others are at most 2 apart."""
_ROWS_AT_ONCE = 512  # 10,000 nodes: blocks of 40 MB


def check_evidence(graph: Graph, evidence: Sequence[Any]) -> list[Array]:
    """The evidence as float32 rows of length 1 (or 0), one row for each feature of the graph.

    Raises:
        ValueError: another number of rows, or numbers that are not finite.
    """
    rows = []
    for at, given in enumerate(evidence):
        array = np.asarray(given, np.float32)
        if array.ndim != 2 or len(array) != graph.n_features:
            raise ValueError(
                f"evidence: expected arrays [{graph.n_features}, any] with a row for each feature of the pruned graph, "
                f"got shape {list(array.shape)} at {at}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"evidence: expected finite numbers, got others in array {at}")
        rows.append(array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-30))
    return rows


def distances(graph: Graph, edges: Edges, nodes: Array, evidence: Sequence[Array]) -> Array:
    """Distances between nodes, in scipy's condensed form: ``1 - similarity``.

    The similarity of two nodes of one kind and owner is the mean of what applies to both:

    * the cosine of their *input profiles*: signed edges into each, as shares of its whole input;
    * the cosine of their *output profiles*: signed edges out of each, as shares of the whole input of their targets;
    * for features, the cosine of their rows in each array of ``evidence`` (decoder rows, encoder rows, activations on
      a corpus, ...).

    The same feature at neighbouring positions gets half of what is missing to 1. Logits, nodes of different kinds, and
    features of a transcoder and of an adapter are ``APART``.

    Args:
        graph: of the pruned graph in its compact form.
        edges: its edges.
        nodes: ``[n]`` ascending numbers of the nodes to compare.
        evidence: from :func:`check_evidence`.

    Returns:
        ``[n (n - 1) / 2]`` float64.
    """
    n = len(nodes)
    condensed = np.empty(n * (n - 1) // 2)
    at = 0
    kind = graph.node_kind.numpy()[nodes]
    identity, owner = _identities(graph, nodes), _owners(graph)[nodes]
    for first, block in _similarity(graph, edges, nodes, kind, evidence):
        last = first + len(block)
        neighbours = (identity[first:last, None, 0] == identity[None, :, 0]) & (
            np.abs(identity[first:last, None, 1] - identity[None, :, 1]) == 1
        )
        block[neighbours] += 0.5 * (1 - block[neighbours])
        np.clip(1 - block, 0, 2, out=block)
        block[owner[first:last, None] != owner[None]] = APART
        block[kind[first:last] == LOGIT] = APART
        for row in range(first, last):
            condensed[at : at + n - row - 1] = block[row - first, row + 1 :]
            at += n - row - 1
    return condensed


def _similarity(
    graph: Graph, edges: Edges, nodes: Array, kind: Array, evidence: Sequence[Array]
) -> Iterator[tuple[int, Array]]:
    """Blocks of rows: (number of the first row, mean of the cosines that apply ``[rows, n]``)."""
    from scipy import sparse

    shares = (
        edges.weights
        / np.maximum(
            np.bincount(edges.targets, np.abs(edges.weights), graph.n_nodes) + edges.remainder, MASS_FLOOR
        )[edges.targets]
    )
    matrix = sparse.csr_array((shares, (edges.targets, edges.sources)), shape=(graph.n_nodes, graph.n_nodes))
    profiles = [_unit_rows(matrix[nodes]), _unit_rows(matrix.T.tocsr()[nodes])]
    is_feature = kind == FEATURE
    rows = [array[nodes[is_feature]] for array in evidence]
    for first in range(0, len(nodes), _ROWS_AT_ONCE):
        part = slice(first, min(first + _ROWS_AT_ONCE, len(nodes)))
        total = np.zeros((part.stop - first, len(nodes)), np.float32)
        terms = np.zeros_like(total)
        for profile, has in profiles:
            total += (profile[part] @ profile.T).toarray()
            terms += has[part, None] & has[None]
        mine = np.flatnonzero(is_feature[part])
        if mine.size and rows:
            own = np.cumsum(is_feature) - 1
            both = np.ix_(mine, np.flatnonzero(is_feature))
            total[both] += sum(array[own[first + mine]] @ array.T for array in rows)
            terms[both] += len(rows)
        yield first, total / np.maximum(terms, 1)


def _unit_rows(matrix: Any) -> tuple[Any, Array]:
    """Rows of length 1 in float32, and which rows hold anything."""
    from scipy import sparse

    length = np.sqrt((matrix * matrix).sum(axis=1))
    scale = sparse.diags_array(1 / np.maximum(length, 1e-30))
    return (scale @ matrix).astype(np.float32).tocsr(), length > 0


def _owners(graph: Graph) -> Array:
    """``[nodes]``: a number for each kind, and one of their own for features of adapters."""
    owner = graph.node_kind.numpy().copy()
    owner[graph.feature_slice][graph.from_adapter.numpy()] = -1
    return owner


def _identities(graph: Graph, nodes: Array) -> Array:
    """``[n, 2]``: a number for each (layer, index), for other nodes one of their own; and the position."""
    features = graph.features.numpy()
    _, which = np.unique(features[:, [0, 2]], axis=0, return_inverse=True)
    other = np.arange(graph.n_features, graph.n_nodes)
    number = np.concatenate([which, other])[nodes]
    return np.stack([number, graph.node_position.numpy()[nodes]], axis=1)
