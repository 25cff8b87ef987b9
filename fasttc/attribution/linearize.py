"""The linear operator between residual streams, and its explicit products: vector-Jacobian and Jacobian-vector.

With attention patterns and norm scales frozen and MLPs replaced, each layer maps the residual linearly. Gradients are
held position-major, ``[P, n, D]``: n targets, positions 0 to P - 1 (causality: nothing reaches later ones), so that
every product is one large matrix product. docs/design/0005-linear-operator.md derives the formulas and their cost.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasttc.models.linear import FrozenLayer, FrozenModel, FrozenNorm
from fasttc.nn import Site, Transcoder, TranscoderSet

if TYPE_CHECKING:
    from fasttc.attribution.beside import MlpPath

_CAUSAL_BLOCK = 256  # patterns are lower triangular: products go block by block and skip the empty half


@dataclass(frozen=True)
class Skip:
    """A skip connection between residuals: it adds ``scale[t] (r[t] matrix)``, norms folded in.

    Attributes:
        matrix: ``[D, D]``, from rows to columns.
        scale: ``[T]``.
    """

    matrix: Tensor
    scale: Tensor

    def vjp(self, gradient: Tensor) -> Tensor:
        """What comes back to the residual from ``gradient [P, n, D]`` (contiguous), same shape."""
        return self._apply(gradient, self.matrix.T)

    def jvp(self, resid: Tensor, first: int = 0) -> Tensor:
        """What is added to the residual ``[T - first, n, D]`` (contiguous) of positions ``first`` on, same shape."""
        return self._apply(resid, self.matrix, first)

    def _apply(self, tensor: Tensor, matrix: Tensor, first: int = 0) -> Tensor:
        length, n, width = tensor.shape
        moved = (tensor.view(length * n, width) @ matrix).view(length, n, width)
        return moved.mul_(self.scale[first : first + length, None, None])


@dataclass(frozen=True)
class LinearLayer:
    """One layer of the local replacement model as linear maps.

    Attributes:
        output: ``[H, D, Dh]``, ``value [KV, Dh, D]``, ``pattern [H, T, T]``: the attention, as in
            :mod:`fasttc.models.linear`.
        value: see ``output``.
        pattern: see ``output``.
        parallel: the MLP reads the layer's input instead of the residual after the attention.
        read: norm between the residual and the transcoder's input x, or None where x is the residual itself.
        write: norm between the transcoder's output y and the residual, or None.
        skip: of the transcoder, or None; with adapters alone the path through the dense MLP.
    """

    output: Tensor
    value: Tensor
    pattern: Tensor
    parallel: bool
    read: FrozenNorm | None
    write: FrozenNorm | None
    skip: "Skip | MlpPath | None"

    @property
    def n_heads(self) -> int:
        return self.output.shape[0]

    @property
    def n_kv_heads(self) -> int:
        return self.value.shape[0]

    @property
    def heads_per_group(self) -> int:
        return self.n_heads // self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.value.shape[1]

    def without_skip(self) -> "LinearLayer":
        """The attention alone: what lies between the residual that the MLP reads and the layer's input."""
        return self if self.skip is None else replace(self, skip=None)

    def read_vjp(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Gradients ``[n, D]`` with respect to x at ``positions [n]``, pulled back to the residual that x reads."""
        return vectors if self.read is None else norm_vjp(self.read, vectors, positions)

    def write_vjp(self, gradient: Tensor) -> Tensor:
        """Gradient ``[P, n, D]`` with respect to the residual, pulled back to y. The same tensor without a norm."""
        if self.write is None:
            return gradient
        return gradient * self.write.scale[: len(gradient), None, None] * self.write.gain

    def attention_vjp_(self, gradient: Tensor) -> None:
        """Adds to ``gradient [P, n, D]`` (contiguous, changed in place) what comes back through the attention."""
        length, n, width = gradient.shape
        rows = gradient.view(length * n, width)
        read = operand(rows, self.output)
        mixed = gradient.new_zeros(self.n_kv_heads, length, n * self.head_dim)
        projected = gradient.new_empty(length * n, self.head_dim)
        for head in range(self.n_heads):
            product(read, self.output[head], projected)
            group = mixed[head // self.heads_per_group]
            queries = projected.view(length, n * self.head_dim)
            for start, stop in _blocks(length):
                weights = self.pattern[head, start:length, start:stop]
                group[start:stop].addmm_(weights.T, queries[start:])
        for group, value in zip(mixed, self.value, strict=True):
            add_product_(rows, group.view(length * n, self.head_dim), value)

    def vjp_(self, gradient: Tensor) -> None:
        """Pulls ``gradient [P, n, D]`` (contiguous) from the residual after this layer to the one before it."""
        if self.skip is None:
            self.attention_vjp_(gradient)
        elif self.parallel:
            skipped = self.skip.vjp(gradient)
            self.attention_vjp_(gradient)
            gradient += skipped
        else:
            gradient += self.skip.vjp(gradient)
            self.attention_vjp_(gradient)

    def attention_jvp(self, resid: Tensor, first: int = 0) -> Tensor:
        """What the attention adds to the residual ``[T - first, n, D]`` of positions ``first`` to T - 1, same shape."""
        length, n, width = resid.shape
        rows, added = operand(resid.view(length * n, width), self.value), torch.zeros_like(resid)
        groups = resid.new_empty(self.n_kv_heads, length, n * self.head_dim)
        for group, value in zip(groups, self.value, strict=True):
            product(rows, value.T, group.view(length * n, self.head_dim))
        mixed = torch.empty_like(groups[0])
        for head in range(self.n_heads):
            group = groups[head // self.heads_per_group]
            for start, stop in _blocks(length):
                weights = self.pattern[head, first + start : first + stop, first : first + stop]
                torch.mm(weights, group[:stop], out=mixed[start:stop])
            add_product_(
                added.view(length * n, width), mixed.view(length * n, self.head_dim), self.output[head].T
            )
        return added


@dataclass(frozen=True)
class LinearModel:
    """The local replacement model of one prompt, as linear maps between residual streams.

    Attributes:
        layers: L of them.
        final_norm: between the last residual and the unembedding.
    """

    layers: tuple[LinearLayer, ...]
    final_norm: FrozenNorm

    @property
    def n_tokens(self) -> int:
        return self.layers[0].pattern.shape[-1]

    def final_vjp(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Gradients ``[n, D]`` with respect to the last norm's output, pulled back to the last residual."""
        return norm_vjp(self.final_norm, vectors, positions)


def linearize(frozen: FrozenModel, tcs: TranscoderSet) -> LinearModel:
    """The operator of a frozen model with one transcoder per layer (only sites and skip connections matter here)."""
    layers = tuple(
        _linear_layer(layer, transcoder, site, frozen.parallel)
        for layer, transcoder, site in zip(frozen.layers, tcs, tcs.sites, strict=True)
    )
    return LinearModel(layers, frozen.final_norm)


def _linear_layer(layer: FrozenLayer, transcoder: Transcoder, site: Site, parallel: bool) -> LinearLayer:
    norm = layer.mlp_norm
    reads = {
        "mlp_in": norm,
        "normalized": FrozenNorm(norm.scale, torch.ones_like(norm.gain), norm.centred),
        "resid_mid": None,
    }
    read = reads[site.x]
    write = layer.mlp_post_norm if site.y == "mlp_out" else None
    weights = layer.weights
    skip = None if transcoder.W_skip is None else _skip(transcoder.W_skip.detach(), read, write, norm.scale)
    return LinearLayer(weights.output, weights.value, layer.pattern, parallel, read, write, skip)


def _skip(W_skip: Tensor, read: FrozenNorm | None, write: FrozenNorm | None, like: Tensor) -> Skip:
    matrix, scale = W_skip.to(like.dtype).T, torch.ones_like(like)
    if read is not None:
        matrix, scale = matrix * read.gain[:, None], scale * read.scale
        if read.centred:
            matrix = matrix - matrix.mean(0)
    if write is not None:
        matrix, scale = matrix * write.gain, scale * write.scale
    return Skip(matrix, scale)


def norm_vjp(norm: FrozenNorm, vectors: Tensor, positions: Tensor) -> Tensor:
    """Gradients ``[n, D]`` at a norm's output pulled back to its input, at ``positions [n]``."""
    back = vectors * norm.gain
    if norm.centred:
        back = back - back.mean(-1, keepdim=True)
    return back * norm.scale[positions, None]


def operand(rows: Tensor, weights: Tensor) -> Tensor:
    """``rows`` as they enter a product with ``weights``: on a GPU rounded to weights of a shorter dtype."""
    return rows.to(weights.dtype) if rows.is_cuda else rows


def product(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """``out = rows @ weights``, summed in the dtype of ``out`` at least.

    Weights of a shorter dtype meet rows of their own dtype on a GPU (tensor cores; see :func:`operand`) and are
    widened elsewhere.
    """
    if rows.is_cuda and rows.dtype != out.dtype:
        return torch.mm(rows, weights, out_dtype=out.dtype, out=out)
    return torch.mm(rows, weights.to(rows.dtype), out=out)


def add_product_(total: Tensor, rows: Tensor, weights: Tensor) -> None:
    """``total += rows @ weights`` with the dtypes of :func:`product`."""
    if rows.dtype == total.dtype and weights.dtype != rows.dtype and rows.is_cuda:
        total += product(operand(rows, weights), weights, torch.empty_like(total))
    else:
        total.addmm_(rows, weights.to(rows.dtype))


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, _CAUSAL_BLOCK):
        yield start, min(start + _CAUSAL_BLOCK, length)
