"""Which attention heads carry an edge: its parts, by the first head that a contribution passes after its source.

In the local replacement model an edge is a sum over paths. A path leaves its source along the residual stream (and skip
connections), and either reaches the target so, or is read by a head first. That head takes the path's whole share, so

    edge = direct + sum over layers l and heads h of part[l, h]

to the last bit of rounding, whatever else the path passes on its way up. For the many edges whose paths cross attention
once, it is *the* head. docs/design/0005-linear-operator.md has the formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttc.attribution.linearize import LinearLayer, LinearModel
from fasttc.attribution.owners import Owners
from fasttc.attribution.sources import Sources
from fasttc.attribution.targets import Feature, Logit, Resolver, Root
from fasttc.graph import Graph
from fasttc.models.linear import layer_weights, unembedding
from fasttc.nn import AdapterSet, TranscoderSet

_Place = tuple[str, int, int, int]  # kind, layer, position, feature (or -1)


@dataclass(frozen=True, eq=False)
class HeadSplit:
    """Parts of E edges of a graph.

    Attributes:
        edges: ``[E, 2]`` int64: target node, source node.
        direct: ``[E]``: what passes no head.
        heads: ``[E, L, H]``: what each head reads first.
    """

    edges: Tensor
    direct: Tensor
    heads: Tensor

    def total(self) -> Tensor:
        """``[E]``: the edges."""
        return self.direct + self.heads.sum((1, 2))

    def strongest(self, edge: int, n: int = 5) -> list[tuple[int, int, float]]:
        """(layer, head, part) of the ``n`` largest parts of one edge by size, largest first; ties by layer and head."""
        flat = self.heads[edge].flatten()
        order = flat.abs().sort(descending=True, stable=True).indices[:n].tolist()
        heads = self.heads.shape[2]
        return [(number // heads, number % heads, float(flat[number])) for number in order]


@torch.no_grad()
def split_by_head(
    model: nn.Module,
    tcs: TranscoderSet | None,
    graph: Graph,
    edges: Sequence[tuple[int, int]] | Tensor | None = None,
    *,
    targets: Sequence[int] | None = None,
    adapters: AdapterSet | None = None,
    base: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> HeadSplit:
    """Splits edges of a graph over attention heads.

    Args:
        model: that the graph was made from, as for :func:`fasttc.attribute`.
        tcs: the same.
        graph: an unpruned or pruned graph of one prompt.
        edges: (target node, source node) pairs, stored or not.
        targets: instead: all stored edges into these nodes.
        adapters: as for :func:`fasttc.attribute`.
        base: as for :func:`fasttc.attribute`.
        dtype: float32 or float64; by default that of the graph's edges.

    Returns:
        :class:`HeadSplit` on the CPU, edges in the order given (or stored). Memory: ``L H T D`` numbers. Deterministic.

    Raises:
        ValueError: both or neither of ``edges`` and ``targets``; a node that does not exist; a target that is no
            feature and no logit of a token; features that the model does not have on this prompt.
    """
    if (edges is None) == (targets is None):
        raise ValueError("split_by_head: expected exactly one of edges and targets")
    pairs = (
        _stored(graph, targets) if edges is None else torch.as_tensor(edges, dtype=torch.int64).reshape(-1, 2)
    )
    if len(pairs) and not 0 <= int(pairs.min()) <= int(pairs.max()) < graph.n_nodes:
        raise ValueError(f"edges: expected nodes in [0, {graph.n_nodes}), got {pairs.min()} to {pairs.max()}")
    dtype = graph.values.dtype if dtype is None else dtype
    owners = Owners(tcs, adapters, base)
    owners.check(model)
    frozen, sources, linear = owners.read(model, graph.input_ids, dtype, layer_weights(model, dtype=dtype))
    resolver = Resolver(linear, sources, frozen.final, unembedding(model), None)
    n_heads = linear.layers[0].n_heads
    direct = torch.zeros(len(pairs), dtype=dtype)
    heads = torch.zeros(len(pairs), len(linear.layers), n_heads, dtype=dtype)
    for target in pairs[:, 0].unique().tolist():
        rows = (pairs[:, 0] == target).nonzero()[:, 0]
        (root,) = resolver.roots([_target(graph, target, frozen.final.shape[0], resolver)], 1, 1.0)
        places = [_place(graph, source) for source in pairs[rows, 1].tolist()]
        parts = _trace(linear, sources, root, places).cpu()  # [E of this target, 1 + L H]
        direct[rows] = parts[:, 0]
        heads[rows] = parts[:, 1:].view(len(rows), -1, n_heads)
    return HeadSplit(pairs, direct, heads)


def _stored(graph: Graph, targets: Any) -> Tensor:
    pairs = []
    for target in targets:
        if not 0 <= target < graph.n_nodes:
            raise ValueError(f"targets: expected nodes in [0, {graph.n_nodes}), got {target}")
        columns = graph.columns[graph.row_ptr[target] : graph.row_ptr[target + 1]].long()
        pairs.append(torch.stack([torch.full_like(columns, target), columns], 1))
    return torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.int64)


def _place(graph: Graph, node: int) -> _Place:
    layer, position = int(graph.node_layer[node]), int(graph.node_position[node])
    if node < graph.n_features:
        return "feature", layer, position, int(graph.features[node, 2])
    if node < graph.token_slice.start:
        return "error", layer, position, -1
    if node < graph.logit_slice.start:
        return "token", -1, position, -1
    raise ValueError(f"edges: expected a feature, an error or a token as source, got logit node {node}")


def _target(graph: Graph, node: int, n_tokens: int, resolver: Resolver) -> Feature | Logit:
    if node < graph.n_features:
        layer, position, index = graph.features[node].tolist()
        return Feature(layer, position, index)
    if node < graph.logit_slice.start:
        raise ValueError(
            f"edges: expected a feature or a logit as target, got node {node}, which has no inputs"
        )
    number = node - graph.logit_slice.start
    token = int(graph.logit_ids[number])
    if token >= len(resolver.unembedding.weight):
        raise ValueError(f"edges: expected a target that is a token, got {graph.logit_labels[number]!r}")
    positions = graph.metadata.get("target_positions", [n_tokens - 1] * graph.n_logits)
    return Logit(token, positions[number], weight=1.0)


def _trace(linear: LinearModel, sources: Sources, root: Root, places: list[_Place]) -> Tensor:
    """``[E, 1 + L H]``: edges from the places to one target, by the head that reads them first (column 0: none)."""
    n_heads = linear.layers[0].n_heads
    found = root.vector.new_zeros(len(places), 1 + len(linear.layers) * n_heads)
    whole = root.vector.new_zeros(root.position + 1, 1, len(root.vector))  # [P, 1, D]
    whole[root.position, 0] = root.vector
    split, columns = whole.clone(), [0]  # [P, R, D]: rows add up to the whole
    depth = root.point.depth

    def read(layer: int, gradient: Tensor) -> None:
        for edge, place in enumerate(places):
            if place[1] == layer and place[2] < len(gradient):
                found[edge, columns] = gradient[place[2]] @ _vector(sources, place)

    def attend(number: int, gradient: Tensor) -> None:
        nonlocal whole, split
        new = _by_head(linear.layers[number], gradient)
        whole = whole + new.sum(1, keepdim=True)
        split = torch.cat([split, new], 1)
        columns.extend(1 + number * n_heads + head for head in range(n_heads))

    if root.point.attention_first:
        attend(depth, whole)
    for number in reversed(range(depth)):
        layer = linear.layers[number]
        read(number, layer.write_vjp(split))
        before = whole
        if layer.skip is not None:
            whole, split = whole + layer.skip.vjp(whole), split + layer.skip.vjp(split.contiguous())
        attend(number, before if layer.parallel else whole)
    read(-1, split)
    return found


def _by_head(layer: LinearLayer, gradient: Tensor) -> Tensor:
    """``[P, H, D]``: what comes back through each head from ``gradient [P, 1, D]``."""
    length = len(gradient)
    projected = torch.einsum("pd,hdk->hpk", gradient[:, 0], layer.output.to(gradient.dtype))
    mixed = layer.pattern[:, :length, :length].transpose(1, 2) @ projected
    value = layer.value.to(gradient.dtype).repeat_interleave(layer.heads_per_group, 0)
    return (mixed @ value).transpose(0, 1)


def _vector(sources: Sources, place: _Place) -> Tensor:
    """``[D]``: what a source writes."""
    kind, layer, position, feature = place
    if kind == "token":
        return sources.embedding[position]
    own = sources.layers[layer]
    if kind == "error":
        return own.errors[position]
    first, last = own.before[position], own.before[position + 1]
    at = (own.features[first:last] == feature).nonzero()[:, 0].tolist()
    if not at:
        raise ValueError(
            f"graph: expected feature {layer}/{position}/{feature} to be active on its prompt, it is not"
        )
    return own.decoder_rows(first + at[0], first + at[0] + 1)[0]
