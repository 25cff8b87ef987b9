"""SparseActs: the active features of a batch of tokens, as values and indices, never as a dense [N, F]."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseActs:
    """Sparse feature activations of ``N = prod(shape)`` tokens over ``n_features`` features.

    Two layouts. *Padded* (TopK): ``values [N, K]`` and ``indices [N, K]``, ``row_ptr`` is None. *CSR* (JumpReLU,
    ReLU, BatchTopK): ``values [nnz]``, ``indices [nnz]`` and ``row_ptr [N + 1]`` (int64).

    Indices are int32 and ascend within a row. An entry is *active* when its value is not zero; entries with value
    zero are allowed (TopK slots that ReLU closed; JumpReLU entries inside the gradient window of the threshold)
    and contribute nothing to a decode, but receive a gradient from it.

    Attributes:
        values: float32 (float64 if the input was), differentiable.
        indices: int32 feature indices.
        n_features: F.
        shape: leading dimensions of the encoded input; ``()`` for one token.
        row_ptr: None, or int64 offsets of the rows.
        gates: None, or, per entry, the 0/1 step ``z > threshold`` with a surrogate gradient to the threshold.
    """

    values: Tensor
    indices: Tensor
    n_features: int
    shape: tuple[int, ...]
    row_ptr: Tensor | None = None
    gates: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        return math.prod(self.shape)

    @property
    def is_csr(self) -> bool:
        return self.row_ptr is not None

    @property
    def tokens(self) -> Tensor:
        """Token number of every entry, int64, same shape as ``values``."""
        rows = torch.arange(self.n_tokens, device=self.values.device)
        if self.row_ptr is None:
            return rows[:, None].expand_as(self.values)
        return rows.repeat_interleave(self.row_ptr.diff(), output_size=self.values.shape[0])

    def active(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token, feature, value) of every active entry, ordered by token, then feature; int64, int64, float."""
        kept = self.values != 0
        return self.tokens[kept], self.indices[kept].long(), self.values[kept]

    def l0(self) -> Tensor:
        """Active features per token, ``[*shape]``, float. Differentiable in the threshold where ``gates`` is set."""
        on = self.gates if self.gates is not None else (self.values != 0).to(self.values.dtype)
        if self.row_ptr is None:
            return on.sum(-1).reshape(self.shape)
        return on.new_zeros(self.n_tokens).index_add(0, self.tokens, on).reshape(self.shape)

    def to_csr(self) -> "SparseActs":
        """The same activations in CSR layout, inactive entries dropped. A CSR input without any is returned as is."""
        if self.is_csr and bool((self.values != 0).all()):
            return self
        token, feature, value = self.active()
        counts = torch.bincount(token, minlength=self.n_tokens)
        row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseActs(value, feature.int(), self.n_features, self.shape, row_ptr)

    def to_dense(self) -> Tensor:
        """``[*shape, F]``. Costs what sparsity was meant to save: for tests and small inputs."""
        flat = self.tokens.reshape(-1) * self.n_features + self.indices.reshape(-1)
        dense = self.values.new_zeros(self.n_tokens * self.n_features)
        return dense.index_add(0, flat, self.values.reshape(-1)).reshape(*self.shape, self.n_features)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per token, (feature indices, values) of its active entries."""
        csr = self.to_csr()
        assert csr.row_ptr is not None, "to_csr returns CSR"
        bounds = csr.row_ptr.tolist()
        for start, stop in pairwise(bounds):
            yield csr.indices[start:stop], csr.values[start:stop]

    def __len__(self) -> int:
        return self.n_tokens

    def detach(self) -> "SparseActs":
        return replace(self, values=self.values.detach(), gates=None)
