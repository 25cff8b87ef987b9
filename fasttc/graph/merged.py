"""A pruned graph with its nodes in supernodes: names, edges, loss, file."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from fasttc.graph import _io
from fasttc.graph.export import node_ids
from fasttc.graph.graph import ERROR, FEATURE, TOKEN, Graph
from fasttc.graph.influence import Array
from fasttc.graph.names import node_names
from fasttc.graph.pruned import PrunedGraph
from fasttc.graph.quotient import (
    Edges,
    MergeLoss,
    Quotient,
    edges_of,
    merge_loss,
    quotient,
    quotient_influence,
)
from fasttc.graph.supernodes import Supernodes

Meaning = Literal["normalised", "additive"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MergedGraph:
    """A pruned graph whose nodes are in supernodes; one of a single node is that node.

    Attributes:
        pruned: the graph, in its compact form.
        supernode: ``[nodes]`` int64: supernode of each node, numbered by their first members; -1 for nodes that were
            not kept and for tokens and logits without an edge.
        names: name of each supernode, all different.

    Raises:
        ValueError: numbers that are not 0 to n - 1, another number of names, a supernode that holds errors and other
            nodes (its explained share would have no meaning).
    """

    pruned: PrunedGraph
    supernode: Tensor
    names: list[str]

    def __post_init__(self) -> None:
        nodes, numbers = self.pruned.graph.n_nodes, self.supernode.numpy()
        if numbers.shape != (nodes,):
            raise ValueError(f"supernode: expected {nodes} entries, got shape {list(numbers.shape)}")
        found = np.unique(numbers[numbers >= 0])
        if not np.array_equal(found, np.arange(len(self.names))) or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"names: expected a different one for each of the {len(found)} supernodes, got {len(self.names)}"
            )
        is_error = self.pruned.graph.node_kind.numpy() == ERROR
        mixed = np.intersect1d(numbers[is_error & (numbers >= 0)], numbers[~is_error & (numbers >= 0)])
        if len(mixed):
            raise ValueError(
                f"supernode: expected errors apart from other nodes, got both in {self.names[mixed[0]]!r}"
            )

    def __repr__(self) -> str:
        return f"MergedGraph({self.n_nodes} supernodes of {self.pruned.n_nodes} nodes)"

    @property
    def n_nodes(self) -> int:
        """Number of supernodes, those of a single node included."""
        return len(self.names)

    @cached_property
    def quotient(self) -> Quotient:
        """Edges between supernodes in every meaning."""
        return quotient(self._edges, self.supernode.numpy())

    @cached_property
    def _edges(self) -> Edges:
        return edges_of(self.pruned)

    def members(self) -> list[list[int]]:
        """Node numbers of each supernode, ascending."""
        members: list[list[int]] = [[] for _ in self.names]
        for node, number in enumerate(self.supernode.tolist()):
            if number >= 0:
                members[number].append(node)
        return members

    def edges(self, meaning: Meaning = "normalised") -> tuple[Tensor, Tensor, Tensor]:
        """Edges between supernodes by target and source: targets, sources ``[m]`` int64, weights ``[m]`` float64.

        Args:
            meaning: ``"normalised"``: signed share of the target's outside input, as the frontend of attribution
                graphs draws it (such shares cannot be added up); ``"additive"``: sum of the members' edge weights.
        """
        if meaning not in ("normalised", "additive"):
            raise ValueError(f"meaning: expected 'normalised' or 'additive', got {meaning!r}")
        found = self.quotient
        weights = found.normalised if meaning == "normalised" else found.additive
        return torch.from_numpy(found.targets), torch.from_numpy(found.sources), torch.from_numpy(weights)

    def influence(self) -> Tensor:
        """``[supernodes]`` float64: influence on the logits along the normalised edges."""
        return torch.from_numpy(quotient_influence(self.quotient))

    @cached_property
    def loss(self) -> MergeLoss:
        """What merging lost, measured."""
        return merge_loss(self._edges, self.supernode.numpy(), self.pruned.scores())

    def supernodes(self, *, pinned: tuple[str, ...] = ()) -> Supernodes:
        """The supernodes of at least two members, as a file holds them."""
        ids = dict(zip(self._kept.tolist(), node_ids(self.pruned.graph, self.pruned.node_mask), strict=True))
        groups = {
            name: tuple(ids[node] for node in members)
            for name, members in zip(self.names, self.members(), strict=True)
            if len(members) > 1
        }
        return Supernodes(groups=groups, pinned=pinned)

    @property
    def _kept(self) -> Tensor:
        return self.pruned.node_mask.nonzero().squeeze(1)

    def save(self, path: str | Path) -> None:
        """Writes one file: ``Graph.load`` reads it as the kept part, ``load_graph`` as this.

        Raises:
            OSError: the file cannot be written; an older file of that name is left as it was.
        """
        tensors, header = self.pruned._content()
        _io.write(path, {**tensors, "supernode": self.supernode}, {**header, "merged": {"names": self.names}})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a merged graph.

        Raises:
            ValueError: as ``Graph.load``; or the graph in the file was not merged.
        """
        tensors, header = _io.read(path)
        if not isinstance(header.get("merged"), dict):
            raise ValueError(f"{path}: expected a merged graph, got a graph that was not merged")
        return cls._from_file(path, tensors, header)

    @classmethod
    def _from_file(cls, path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        pruned = PrunedGraph._from_file(path, tensors, header)
        try:
            return cls(pruned=pruned, supernode=tensors["supernode"], names=list(header["merged"]["names"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: broken graph file: {error}") from error


def merged_graph(pruned: PrunedGraph, group: Array, names: dict[int, str] | None = None) -> MergedGraph:
    """A merged graph from any group numbers, which are put in order.

    Args:
        pruned: in its compact form.
        group: ``[nodes]`` int64, equal numbers for one supernode, -1 for none.
        names: of some groups, by number; the others are named after what they hold.
    """
    found, first = np.unique(group, return_index=True)
    ordered = found[np.argsort(first)]
    ordered = ordered[ordered >= 0]
    number = {old: new for new, old in enumerate(ordered.tolist())}
    supernode = torch.tensor([number.get(old, -1) for old in group.tolist()])
    members: list[list[int]] = [[] for _ in ordered]
    for node, new in enumerate(supernode.tolist()):
        if new >= 0:
            members[new].append(node)
    single = node_names(pruned.graph)
    given, taken, chosen = names or {}, set((names or {}).values()), []
    for old, nodes in zip(ordered.tolist(), members, strict=True):
        chosen.append(given[old] if old in given else _name(pruned.graph, single, nodes, taken))
        taken.add(chosen[-1])
    return MergedGraph(pruned=pruned, supernode=supernode, names=chosen)


def _name(graph: Graph, single: list[str], nodes: list[int], taken: set[str]) -> str:
    """A single node's own name; else layers and positions of features and errors, the text of tokens and logits."""
    kinds, layers = set(graph.node_kind[nodes].tolist()), graph.node_layer[nodes].tolist()
    positions = sorted(set(graph.node_position[nodes].tolist()))
    words = " ".join(graph.tokens[position].strip() or "_" for position in positions[:4])
    words += " ..." if len(positions) > 4 else ""
    if len(nodes) == 1:
        text = single[nodes[0]]
    elif kinds == {TOKEN}:
        text = f"tokens {words}"
    else:
        span = f"L{min(layers)}" if min(layers) == max(layers) else f"L{min(layers)}-{max(layers)}"
        what = "errors" if kinds == {ERROR} else "features" if kinds == {FEATURE} else "nodes"
        text = f"{span} {len(nodes)} {what} at {words}"
    unique, copies = text, 1
    while unique in taken:
        copies += 1
        unique = f"{text} ({copies})"
    return unique
