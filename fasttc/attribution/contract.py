"""Contraction of gradients with what sits at one layer: the last step from gradients to edges."""

from bisect import bisect_left

import torch
from torch import Tensor

from fasttc import ops
from fasttc.attribution.positions import Positions
from fasttc.attribution.sources import LayerSources

_GATHER = 16  # positions whose decoder rows are gathered together: fewer, larger gathers


class Contraction:
    """Edges from one layer's features and errors.

    Args:
        layer: the sources.
        by_op: contracts all positions at once by ``fasttc.ops.edges`` (the way for a GPU); otherwise by one matrix
            product per position.
        copy: for products per position: gathers the active decoder rows, times their weights, once. Otherwise
            they are gathered each time, which needs no memory.
    """

    def __init__(self, layer: LayerSources, *, by_op: bool, copy: bool) -> None:
        self.layer, self.by_op = layer, by_op
        self._rows = layer.decoder_rows(0, len(layer.features)) if copy and not by_op else None

    def write(self, kind: str, gradient: Tensor, positions: Positions, out: Tensor) -> None:
        """Writes edges into the last columns up to the gradient's last position; how far back ``out`` says.

        Args:
            kind: "feature" or "error".
            gradient: ``[P, n, D]`` with respect to the layer's y.
            positions: of the n targets.
            out: ``[n, width]``, zeros. For features: those of the last positions, as many as there are columns. For
                errors: one column per position. Edges from positions after a target's own stay zero.
        """
        if kind == "error":
            dots(gradient, self.layer.errors, positions, out)
        elif self.by_op:
            self._features_by_op(gradient, positions, out)
        else:
            self._features(gradient, positions, out)

    def _features(self, gradient: Tensor, positions: Positions, out: Tensor) -> None:
        before, length = self.layer.before, len(gradient)
        start = before[length] - out.shape[1]
        rows = self._rows
        gathered = range(0) if rows is None else range(len(rows))
        for position in range(length):
            low, high = before[position], before[position + 1]
            if low == high or low < start:
                continue
            if rows is None or low >= gathered.stop:
                gathered = range(low, before[min(position + _GATHER, length)])
                rows = self.layer.decoder_rows(gathered.start, gathered.stop)
            own = rows[low - gathered.start : high - gathered.start]
            reached = bisect_left(positions.numbers, position)
            torch.mm(gradient[position, reached:], own.T, out=out[reached:, low - start : high - start])

    def _features_by_op(self, gradient: Tensor, positions: Positions, out: Tensor) -> None:
        layer = self.layer
        stop = layer.before[len(gradient)]
        start = stop - out.shape[1]
        out[:] = ops.edges(
            gradient.transpose(0, 1),
            layer.W_dec,
            layer.rows[start:stop],
            layer.positions[start:stop],
            layer.weights[start:stop],
            target_positions=positions.tensor,
        )


def dots(gradient: Tensor, vectors: Tensor, positions: Positions, out: Tensor) -> None:
    """``<gradient[t, b], vectors[t]>`` for the last positions t, as many as ``out`` has columns.

    Args:
        gradient: ``[P, n, D]``.
        vectors: ``[T, D]``.
        positions: of the n targets.
        out: ``[n, up to P]``, zeros; entries after a target's own position stay zero.
    """
    length = len(gradient)
    first = length - out.shape[1]
    if gradient.is_cuda:
        out.copy_(torch.bmm(gradient[first:], vectors[first:length, :, None])[:, :, 0].T)
        return
    for position in range(first, length):  # on the CPU, a batched product of single columns is slow
        reached = bisect_left(positions.numbers, position)
        torch.mv(gradient[position, reached:], vectors[position], out=out[reached:, position - first])
