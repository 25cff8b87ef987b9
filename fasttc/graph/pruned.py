"""What pruning keeps: masks over a graph, the kept part as a graph of its own, its scores, its file."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from fasttc.graph import _io
from fasttc.graph.influence import Rows, Scores, row_mass, rows_of

if TYPE_CHECKING:
    from fasttc.graph.graph import Graph


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PrunedGraph:
    """What pruning keeps of a graph: masks over the nodes and stored edges of ``graph``.

    Attributes:
        graph: the graph that the masks refer to.
        node_threshold, edge_threshold: shares of the influence that were asked for.
        node_mask: ``[nodes]`` bool; tokens and logits are always kept.
        edge_mask: ``[edges]`` bool over the stored edges; a kept edge joins kept nodes.
        influence: ``[nodes]`` float64: influence in the whole graph.
        cumulative: ``[nodes]`` float64: share of all influence held by the nodes down to this one, in descending order
            (0 to 1, small = important; what circuit-tracer writes as a node's ``influence``).
        full_scores: scores of the whole graph.
    """

    graph: "Graph"
    node_threshold: float
    edge_threshold: float
    node_mask: Tensor
    edge_mask: Tensor
    influence: Tensor
    cumulative: Tensor
    full_scores: Scores

    def __repr__(self) -> str:
        whole = self.graph
        return (
            f"PrunedGraph({self.n_nodes} of {whole.n_nodes} nodes, {self.n_edges} of {whole.n_edges} edges)"
        )

    @cached_property
    def n_nodes(self) -> int:
        """Number of nodes kept."""
        return int(self.node_mask.sum())

    @cached_property
    def n_features(self) -> int:
        """Number of features kept."""
        return int(self.node_mask[self.graph.feature_slice].sum())

    @cached_property
    def n_edges(self) -> int:
        """Number of edges kept."""
        return int(self.edge_mask.sum())

    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Kept edges, by target and source: targets ``[n_edges]`` and sources ``[n_edges]`` int64, signed weights."""
        kept = self.edge_mask.nonzero().squeeze(1)
        targets = torch.searchsorted(self.graph.row_ptr, kept, right=True) - 1
        return targets, self.graph.columns[kept].long(), self.graph.values[kept]

    def dense_mask(self) -> Tensor:
        """``[nodes, nodes]`` bool, rows = targets. Needs nodes^2 memory."""
        mask = torch.zeros(self.graph.n_nodes, self.graph.n_nodes, dtype=torch.bool)
        targets, sources, _ = self.edges()
        mask[targets, sources] = True
        return mask

    def subgraph(self) -> "Graph":
        """The kept features and edges as a graph of their own, with all errors, tokens and logits in their places.

        The mass of every dropped edge is added to its row's ``remainder``: shares in the small graph are shares of the
        whole one, and its ``score_bounds`` say what dropping cost.
        """
        graph = self.graph
        targets, sources, values = self.edges()
        nodes = self.node_mask.clone()
        nodes[graph.n_features :] = True
        number = nodes.cumsum(0) - 1
        kept = Rows(_row_ptr(targets, graph.n_nodes).numpy(), sources.numpy(), values.numpy())
        whole = row_mass(rows_of(graph))
        dropped = np.where(np.diff(kept.row_ptr) < graph.row_ptr.diff().numpy(), whole - row_mass(kept), 0.0)
        feature_mask = self.node_mask[graph.feature_slice]
        return replace(
            graph,
            features=graph.features[feature_mask],
            activations=graph.activations[feature_mask],
            row_ptr=_row_ptr(number[targets], int(nodes.sum())),
            columns=number[sources].to(torch.int32),
            values=values,
            remainder=(graph.remainder + torch.from_numpy(np.maximum(dropped, 0.0)))[nodes],
            metadata={**graph.metadata, "pruned": self._origin()},
        )

    def _origin(self) -> dict[str, float]:
        """What the metadata of the kept part says about the whole; of a graph that was a kept part, about its whole."""
        sizes = {"nodes": self.graph.n_nodes, "edges": self.graph.n_edges}
        thresholds = {"node_threshold": self.node_threshold, "edge_threshold": self.edge_threshold}
        return {**sizes, **self.graph.metadata.get("pruned", {}), **thresholds}

    def compact(self) -> Self:
        """The same pruned graph, referring to ``subgraph()`` instead of the whole graph."""
        if self.n_edges == self.graph.n_edges and self.n_features == self.graph.n_features:
            return self
        nodes = self.node_mask.clone()
        nodes[self.graph.n_features :] = True
        small = self.subgraph()
        return replace(
            self,
            graph=small,
            node_mask=self.node_mask[nodes],
            edge_mask=torch.ones(small.n_edges, dtype=torch.bool),
            influence=self.influence[nodes],
            cumulative=self.cumulative[nodes],
        )

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> "PrunedGraph":
        """Keeps less: shares of the influence within the kept part, from which what was dropped is missing.

        ``full_scores`` and the sizes in the metadata stay those of the whole graph, where they are known.

        Raises:
            ValueError: a threshold outside 0 to 1.
        """
        less = self.compact().graph.prune(node_threshold, edge_threshold)
        return replace(less, full_scores=self.full_scores)

    def scores(self, dropped: Literal["error", "ignore"] = "error") -> Scores:
        """Scores of what was kept.

        Args:
            dropped: ``"error"`` counts the mass of dropped (and unstored) edges as unexplained, as if it came from
                error nodes, so that the scores fall as more is pruned; ``"ignore"`` normalises the kept edges among
                themselves, which is what circuit-tracer's formula gives on the masked adjacency.
        """
        if dropped == "error":
            return self.subgraph().score_bounds().lower
        if dropped == "ignore":
            small = self.subgraph()
            return replace(small, remainder=torch.zeros(small.n_nodes)).scores()
        raise ValueError(f"dropped: expected 'error' or 'ignore', got {dropped!r}")

    def save(self, path: str | Path) -> None:
        """Writes ``compact()`` and what pruning found as one file: ``Graph.load`` reads it as a graph of its own.

        Raises:
            TypeError: the graph's ``metadata`` holds something that JSON cannot.
            OSError: the file cannot be written; an older file of that name is left as it was.
        """
        _io.write(path, *self._content())

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of the file."""
        small = self.compact()
        tensors = {name: getattr(small, name) for name in _io.PRUNED_TENSORS}
        pruned = {
            "node_threshold": self.node_threshold,
            "edge_threshold": self.edge_threshold,
            # JSON has no NaN; null stands for the score of a graph whose influence ends nowhere.
            "full_scores": [None if np.isnan(score) else score for score in self.full_scores],
        }
        return {**_io.tensors_of(small.graph), **tensors}, {**_io.header_of(small.graph), "pruned": pruned}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a pruned graph. The masks refer to the kept part, which is all that the file holds.

        Raises:
            ValueError: as ``Graph.load``; or the graph in the file was not pruned.
        """
        tensors, header = _io.read(path)
        if not isinstance(header.get("pruned"), dict):
            raise ValueError(f"{path}: expected a pruned graph, got a graph that was not pruned")
        return cls._from_file(path, tensors, header)

    @classmethod
    def _from_file(cls, path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        from fasttc.graph.graph import Graph  # not at the top: a graph knows how to prune itself

        graph, pruned = Graph._from_file(path, tensors, header), header["pruned"]
        try:
            return cls(
                graph=graph,
                node_threshold=float(pruned["node_threshold"]),
                edge_threshold=float(pruned["edge_threshold"]),
                edge_mask=torch.ones(graph.n_edges, dtype=torch.bool),
                full_scores=Scores(
                    *(float("nan") if score is None else score for score in pruned["full_scores"])
                ),
                **{name: _per_node(name, tensors[name], graph.n_nodes) for name in _io.PRUNED_TENSORS},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: broken graph file: {error}") from error


def _per_node(name: str, tensor: Tensor, nodes: int) -> Tensor:
    if tensor.shape != (nodes,):
        raise ValueError(f"{name}: expected {nodes} entries, got shape {list(tensor.shape)}")
    return tensor


def _row_ptr(rows: Tensor, nodes: int) -> Tensor:
    """Row pointers ``[nodes + 1]`` of ascending row numbers."""
    return torch.searchsorted(rows, torch.arange(nodes + 1))
