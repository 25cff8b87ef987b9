"""The attribution graph: nodes as arrays, edges as compressed rows, and what can be asked of it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fasttc.graph import _check, _io
from fasttc.graph import influence as _influence
from fasttc.graph.influence import ScoreBounds, Scores
from fasttc.graph.prune import prune
from fasttc.graph.pruned import PrunedGraph

FEATURE, ERROR, TOKEN, LOGIT = range(4)
KINDS = ("feature", "error", "token", "logit")

_DENSE_ROWS_PER_STEP = 256


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Graph:
    """Attribution graph of one prompt. Rows are targets, columns are sources.

    Nodes are numbered: features (layer, position, index), errors (layer-major, then position), tokens (position),
    logits. An edge runs from a lower layer to a higher one; errors and tokens have no incoming edges. All tensors are
    on the CPU; the constructor takes anything ``torch.as_tensor`` takes and checks all of it.

    Attributes:
        n_layers: number of layers with transcoders, L.
        features: ``[n, 3]`` int64: layer, position, index of each active feature, ascending, no duplicates.
        activations: ``[n]`` float: the features' activations.
        input_ids: ``[T]`` int64: the prompt.
        logit_ids: ``[K]`` int64: target tokens (numbers beyond the vocabulary for targets of another kind).
        logit_probs: ``[K]`` float: their weights in the influence, not negative.
        row_ptr: ``[nodes + 1]`` int64: row ``t`` holds the edges ``row_ptr[t]`` to ``row_ptr[t + 1]``.
        columns: ``[edges]`` int32: sources, ascending within a row.
        values: ``[edges]`` float32 or float64: signed edge weights.
        remainder: ``[nodes]`` float64: sum of ``|weight|`` over each row's edges that are not stored; 0 for exact
            rows (the default).
        tokens: T strings; ids as strings by default.
        logit_labels: K strings, one for each target; ids as strings by default.
        prompt: the prompt as text.
        metadata: provenance that JSON can hold: ``model``, ``transcoders``, versions, dtype, seed, precision, ...

    Raises:
        ValueError: a shape, order or value that is not as above; the message says what was expected and found.
        TypeError: floating-point numbers where integers belong.
    """

    n_layers: int
    features: Tensor
    activations: Tensor
    input_ids: Tensor
    logit_ids: Tensor
    logit_probs: Tensor
    row_ptr: Tensor
    columns: Tensor
    values: Tensor
    remainder: Tensor = field(default_factory=lambda: torch.zeros(0))
    tokens: list[str] = field(default_factory=list)
    logit_labels: list[str] = field(default_factory=list)
    prompt: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check.normalise(self)
        _check.check_nodes(self)
        _check.check_edges(self)

    @classmethod
    def from_dense(
        cls,
        adjacency: Tensor,
        *,
        features: Tensor,
        activations: Tensor,
        input_ids: Tensor,
        logit_ids: Tensor,
        logit_probs: Tensor,
        n_layers: int | None = None,
        **described: Any,
    ) -> Self:
        """Graph of the non-zero entries of a dense matrix ``[nodes, nodes]`` (rows = targets), all rows exact.

        ``n_layers`` follows from the number of nodes when it is not given; ``described`` are the other attributes
        (``tokens``, ``logit_labels``, ``prompt``, ``metadata``).
        """
        adjacency = torch.as_tensor(adjacency).detach().cpu()
        if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
            raise ValueError(f"adjacency: expected [nodes, nodes], got {list(adjacency.shape)}")
        if adjacency.dtype != torch.float64:
            adjacency = adjacency.float()
        nodes, n_tokens = adjacency.shape[0], len(input_ids)
        others = nodes - len(features) - n_tokens - len(logit_ids)
        layers = others // max(n_tokens, 1) if n_layers is None else n_layers
        if others != layers * n_tokens:
            raise ValueError(
                f"adjacency: expected {len(features)} features + {layers} x {n_tokens} errors + {n_tokens} tokens + "
                f"{len(logit_ids)} logits = {nodes - others + layers * n_tokens} nodes, got {nodes}"
            )
        counts, columns, values = [], [], []
        for rows in adjacency.split(_DENSE_ROWS_PER_STEP):
            stored = rows != 0  # NaN is stored too, and then refused by the check of the values
            counts.append(stored.sum(dim=1))
            columns.append(stored.nonzero()[:, 1].to(torch.int32))
            values.append(rows[stored])
        row_ptr = torch.zeros(nodes + 1, dtype=torch.int64)
        torch.cumsum(torch.cat(counts), 0, out=row_ptr[1:])
        return cls(
            n_layers=layers,
            features=features,
            activations=activations,
            input_ids=input_ids,
            logit_ids=logit_ids,
            logit_probs=logit_probs,
            row_ptr=row_ptr,
            columns=torch.cat(columns),
            values=torch.cat(values),
            **described,
        )

    def __repr__(self) -> str:
        return (
            f"Graph({self.n_features} features, {self.n_errors} errors, {self.n_tokens} tokens, "
            f"{self.n_logits} logits, {self.n_edges} edges, {self.n_layers} layers)"
        )

    # Sizes and places

    @property
    def n_features(self) -> int:
        return len(self.features)

    @property
    def n_errors(self) -> int:
        return self.n_layers * self.n_tokens

    @property
    def n_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def n_logits(self) -> int:
        return len(self.logit_ids)

    @property
    def n_nodes(self) -> int:
        return self.n_features + self.n_errors + self.n_tokens + self.n_logits

    @property
    def n_edges(self) -> int:
        return len(self.values)

    @property
    def feature_slice(self) -> slice:
        return slice(0, self.n_features)

    @property
    def error_slice(self) -> slice:
        return slice(self.n_features, self.n_features + self.n_errors)

    @property
    def token_slice(self) -> slice:
        return slice(self.error_slice.stop, self.error_slice.stop + self.n_tokens)

    @property
    def logit_slice(self) -> slice:
        return slice(self.token_slice.stop, self.n_nodes)

    @cached_property
    def node_kind(self) -> Tensor:
        """``[nodes]`` int8: ``FEATURE``, ``ERROR``, ``TOKEN`` or ``LOGIT``."""
        sizes = torch.tensor([self.n_features, self.n_errors, self.n_tokens, self.n_logits])
        return torch.repeat_interleave(torch.arange(4, dtype=torch.int8), sizes)

    @cached_property
    def node_layer(self) -> Tensor:
        """``[nodes]`` int64: layer; -1 for tokens, ``n_layers`` for logits."""
        errors = torch.arange(self.n_layers).repeat_interleave(self.n_tokens)
        tokens, logits = torch.full((self.n_tokens,), -1), torch.full((self.n_logits,), self.n_layers)
        return torch.cat([self.features[:, 0], errors, tokens, logits])

    @cached_property
    def node_position(self) -> Tensor:
        """``[nodes]`` int64: position in the prompt; the last one for logits."""
        positions = torch.arange(self.n_tokens)
        logits = torch.full((self.n_logits,), self.n_tokens - 1)
        return torch.cat([self.features[:, 1], positions.repeat(self.n_layers), positions, logits])

    @cached_property
    def from_adapter(self) -> Tensor:
        """``[n]`` bool: features of adapters. Their index follows those of the layer's transcoder (``metadata``)."""
        first = self.metadata.get("adapters_from")
        if first is None:
            return torch.zeros(self.n_features, dtype=torch.bool)
        return self.features[:, 2] >= torch.tensor(first)[self.features[:, 0]]

    @cached_property
    def owners(self) -> list[str]:
        """Whose each feature is, ``"transcoder"`` or ``"adapter"``; n of them, none in a graph without adapters."""
        if "adapters_from" not in self.metadata:
            return []
        return ["adapter" if own else "transcoder" for own in self.from_adapter.tolist()]

    @cached_property
    def row_blocks(self) -> list[tuple[int, int]]:
        """Ranges ``(first, last)`` of the rows that have inputs, from the logits down to the lowest layer.

        Within a block no row is another's source; the sources of a block lie in later blocks, errors and tokens.
        """
        starts = np.searchsorted(self.features[:, 0].numpy(), np.arange(self.n_layers + 1)).tolist()
        layers = [(starts[i], starts[i + 1]) for i in reversed(range(self.n_layers))]
        return [(self.logit_slice.start, self.n_nodes), *(block for block in layers if block[0] < block[1])]

    # What can be asked

    def dense(self) -> Tensor:
        """Adjacency ``[nodes, nodes]`` in the edges' dtype, rows = targets. Needs nodes^2 memory."""
        dense = torch.zeros(self.n_nodes, self.n_nodes, dtype=self.values.dtype)
        rows = torch.repeat_interleave(torch.arange(self.n_nodes), self.row_ptr.diff())
        dense[rows, self.columns.long()] = self.values
        return dense

    def row_mass(self) -> Tensor:
        """``[nodes]`` float64: sum of ``|weight|`` over all edges into each node, stored or not."""
        return torch.from_numpy(_influence.total_mass(self))

    def influence(self) -> Tensor:
        """``[nodes]`` float64: ``w P + w P^2 + ...``, the share of the targets' probability that passes through a node.

        ``P`` is the row-normalised ``|adjacency|`` and ``w`` the probabilities (methods.md 6.4). Exact up to float64
        rounding for exact rows; with a remainder it is a lower bound, at most ``influence_bound()`` too low. One pass
        over the edges, bitwise the same from run to run.
        """
        return torch.from_numpy(_influence.influence(self))

    def influence_bound(self) -> Tensor:
        """``[nodes]`` float64: by how much at most ``influence()`` is too low because edges are not stored."""
        return _influence.influence_bound(self)

    def scores(self, influence: Tensor | None = None) -> Scores:
        """Replacement and completeness scores; ``influence`` saves the pass over the edges when it is at hand.

        With a remainder, mass that is not stored counts neither as explained nor as error: see ``score_bounds``.
        """
        arrived = _influence.influence(self) if influence is None else influence.to(torch.float64).numpy()
        return _influence.scores(self, arrived)

    def score_bounds(self) -> ScoreBounds:
        """Lower and upper end of each score, whatever the unstored edges are; both are ``scores()`` for exact rows."""
        return _influence.score_bounds(self)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PrunedGraph:
        """Keeps the nodes and edges that carry the given shares of the influence; see ``fasttc.graph.prune.prune``."""
        return prune(self, node_threshold, edge_threshold)

    # Files

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with a JSON header, whole or not at all.

        Raises:
            TypeError: ``metadata`` holds something that JSON cannot.
            OSError: the file cannot be written; an older file of that name is left as it was.
        """
        _io.write(path, _io.tensors_of(self), _io.header_of(self))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a graph; of a pruned one, the part that was kept (``PrunedGraph.load`` also reads what pruning found).

        Raises:
            ValueError: not a graph file, a newer schema, missing tensors or broken content; one line with the path.
        """
        tensors, header = _io.read(path)
        return cls._from_file(path, tensors, header)

    @classmethod
    def _from_file(cls, path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        try:
            return cls(**{name: tensors[name] for name in _io.GRAPH_TENSORS}, **_io.described(header))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: broken graph file: {error}") from error
