"""Gradients of a cohort of targets on their way down through the layers."""

import torch
from torch import Tensor

from fasttc.attribution.linearize import LinearLayer, Skip, operand, product
from fasttc.attribution.positions import Positions

# A matrix product whose inner dimension is a small rank moves more memory per operation than a wide one.
_SPREAD_PENALTY = 1.5


class Pullback:
    """The gradient of n targets, ``[P, n, D]``, at one residual stream; goes down layer by layer.

    At its start a target's gradient lives at one position. An attention layer spreads it over all earlier ones, but
    as H + 1 vectors with coefficients that all targets of the same position share:

        gradient[t, b] = sum_r coefficients[position of b][r, t] vectors[r, b]

    While that rank R is small, a layer costs two products over R vectors instead of over P positions, so the factors
    are carried along until a count of operations says that the dense form is cheaper.

    Args:
        vectors: ``[n, D]``: the targets' gradients at their own positions.
        positions: of the targets.
    """

    def __init__(self, vectors: Tensor, positions: Positions) -> None:
        n, width = vectors.shape
        self.positions = positions
        self.gradient = vectors.new_zeros(positions.length, n, width)
        self.gradient[positions.tensor, torch.arange(n, device=vectors.device)] = vectors
        self._runs = list(positions.runs())
        coefficients = vectors.new_zeros(len(self._runs), 1, positions.length)
        for number, (position, _) in enumerate(self._runs):
            coefficients[number, 0, position] = 1
        self._factors: tuple[Tensor, Tensor] | None = (coefficients, vectors[None])

    def through(self, layer: LinearLayer) -> None:
        """Goes from the residual after ``layer`` to the one before it."""
        if self._factors is not None and self._factors_are_cheaper(layer):
            before = self._factors
            if isinstance(layer.skip, Skip):
                self._add(*_skip_factors(layer.skip, *before))
            self._add(*_attention_factors(layer, *(before if layer.parallel else self._factors)))
        else:
            self._factors = None
            layer.vjp_(self.gradient)

    def _factors_are_cheaper(self, layer: LinearLayer) -> bool:
        assert self._factors is not None, "checked by the caller"
        if not isinstance(layer.skip, Skip | None):
            return False  # a dense MLP is another matrix at each position: coefficients could not be shared
        length, n, width = self.gradient.shape
        heads, head_dim = layer.n_heads, layer.head_dim
        groups, rank = self._factors[0].shape[:2]
        after_skip = rank if layer.skip is None else 2 * rank
        if after_skip * (1 + heads) > max(1 + heads, length):
            return False  # more vectors than positions: also bounds the memory
        reached = sum(position + 1 for position in self.positions)
        new = after_skip * (1 + heads) - rank
        factored = (
            n * after_skip * 4 * width * heads * head_dim
            + groups * after_skip * heads * 2 * length**2
            + reached * 2 * new * width * _SPREAD_PENALTY
        )
        dense = (
            length * n * (2 * width * head_dim * (heads + layer.n_kv_heads) + 2 * heads * head_dim * length)
        )
        if layer.skip is not None:
            factored += n * rank * 2 * width**2
            dense += length * n * 2 * width**2
        return factored < dense

    def _add(self, coefficients: Tensor, vectors: Tensor) -> None:
        """Adds new factors to the gradient and to the old factors."""
        assert self._factors is not None, "factors only grow where there are some"
        length, n, width = self.gradient.shape
        flat, wide = self.gradient.view(length, n * width), vectors.view(-1, n * width)
        for (position, rows), weights in zip(self._runs, coefficients, strict=True):
            reach, columns = position + 1, slice(rows.start * width, rows.stop * width)
            flat[:reach, columns].addmm_(weights[:, :reach].T, wide[:, columns])
        old_coefficients, old_vectors = self._factors
        self._factors = torch.cat([old_coefficients, coefficients], 1), torch.cat([old_vectors, vectors])


def _attention_factors(layer: LinearLayer, coefficients: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of what comes back through the attention: ``[groups, H R, P]`` and ``[H R, n, D]``."""
    groups, rank, length = coefficients.shape
    _, n, width = vectors.shape
    heads = layer.n_heads
    new_coefficients = coefficients.new_empty(groups, heads, rank, length)
    new_vectors = vectors.new_empty(heads, rank * n, width)
    read = operand(vectors.view(rank * n, width), layer.output)
    projected = vectors.new_empty(rank * n, layer.head_dim)
    for head in range(heads):
        spread = coefficients.view(groups * rank, length) @ layer.pattern[head, :length, :length]
        new_coefficients[:, head] = spread.view(groups, rank, length)
        product(read, layer.output[head], projected)
        value = layer.value[head // layer.heads_per_group]
        product(operand(projected, value), value, new_vectors[head])
    return new_coefficients.view(groups, heads * rank, length), new_vectors.view(heads * rank, n, width)


def _skip_factors(skip: Skip, coefficients: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of what comes back through the skip connection: ``[groups, R, P]`` and ``[R, n, D]``."""
    rank, n, width = vectors.shape
    length = coefficients.shape[-1]
    back = (vectors.view(rank * n, width) @ skip.matrix.T).view(rank, n, width)
    return coefficients * skip.scale[:length], back
