"""Edges of the token embeddings, found by going upwards from the tokens instead of downwards from the targets."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasttc.attribution.linearize import LinearModel
from fasttc.attribution.plan import Budget, Point
from fasttc.attribution.sources import Sources

if TYPE_CHECKING:
    from fasttc.attribution.trace import Targets

_PARTS = 4  # tokens of a part start from its first position: parts save the work on positions before them


def token_edges(
    model: LinearModel, sources: Sources, targets: "Sequence[Targets]", budget: Budget
) -> list[Tensor]:
    """``[n, T]`` per group of targets: what each token embedding adds to each target; zero after its position.

    Follows the contribution of each token to the residual stream, ``[T, tokens, D]``, up through the layers and
    reads it wherever targets are. T tokens are followed instead of n targets.
    """
    edges = [sources.embedding.new_zeros(len(group), sources.n_tokens) for group in targets]
    embedding = sources.embedding
    most = max(1, min(budget.limit // 4, budget.preferred) // embedding.nbytes)
    size = min(most, -(-sources.n_tokens // _PARTS))
    for first in range(0, sources.n_tokens, size):
        tokens = embedding[first : first + size]
        resid = embedding.new_zeros(sources.n_tokens - first, len(tokens), embedding.shape[1])
        own = torch.arange(len(tokens), device=resid.device)
        resid[own, own] = tokens
        for number in range(sources.n_layers + 1):
            _read(resid, first, Point(number, attention_first=False), targets, edges)
            if number == sources.n_layers:
                break
            layer = model.layers[number]
            after = resid + layer.attention_jvp(resid, first)
            _read(after, first, Point(number, attention_first=True), targets, edges)
            if layer.skip is not None:
                after += layer.skip.jvp(resid if layer.parallel else after, first)
            resid = after
    return edges


def _read(resid: Tensor, first: int, point: Point, targets: "Sequence[Targets]", edges: list[Tensor]) -> None:
    """Writes the edges of tokens ``first``, ... into the targets at ``point``."""
    columns = slice(first, first + resid.shape[1])
    for group, out in zip(targets, edges, strict=True):
        if group.point != point:
            continue
        for position, rows in group.positions.runs():
            if position >= first:
                vectors = group.vectors(rows.start, rows.stop)
                torch.mm(vectors, resid[position - first].T, out=out[rows, columns])
