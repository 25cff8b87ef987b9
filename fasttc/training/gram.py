"""Second moments of sparse codes, ``A^T A``: added up over a stream without a dense [tokens, features] block."""

from collections.abc import Callable

import torch
from torch import Tensor

from fasttc import ops
from fasttc.ops import SparseActs
from fasttc.ops.segment import transposed

DENSE_FEATURES = 4096
"""Up to so many features the matrix is held whole (128 MiB in float64); above it only pairs that occur together."""
DENSE_PRODUCT_FEATURES = 32_768
"""Up to so many features products with a matrix that is nearly full run over a dense copy (4 GiB in float32)."""
PAIRS_AT_ONCE = 2**22
"""Pairs made in one go: bounds what a block of tokens needs besides the sums."""


class Gram:
    """``A^T A`` [F, F] of activations A [N, F], in float64.

    The upper triangle is kept, dense up to ``dense_features`` and above it as sorted pairs: 16 bytes for each pair
    of features that was ever active on one token. New pairs wait until they are as many as the sorted ones, so that
    sorting costs ``O(log N)`` per pair. Deterministic: pairs are summed in the order of the tokens.

    Args:
        n_features: F.
        device: of the sums.
        dense_features: largest F whose matrix is held whole.
    """

    def __init__(
        self, n_features: int, device: torch.device, *, dense_features: int = DENSE_FEATURES
    ) -> None:
        self.n_features = n_features
        self.is_dense = n_features <= dense_features
        length = n_features**2 if self.is_dense else 0
        self._sums = torch.zeros(length, dtype=torch.float64, device=device)
        self._keys = torch.zeros(0, dtype=torch.int64, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._n_waiting = 0

    @torch.no_grad()
    def add(self, acts: SparseActs) -> None:
        """Counts the tokens of ``acts``."""
        values, indices = padded(acts)
        width = values.shape[1]
        left, right = torch.triu_indices(width, width, device=values.device)
        for v, i in zip(
            *(t.split(max(1, PAIRS_AT_ONCE // max(len(left), 1))) for t in (values, indices)), strict=True
        ):
            products = (v[:, left] * v[:, right]).flatten()
            keys = (i[:, left] * self.n_features + i[:, right]).flatten()
            self._add_pairs(keys, products)

    def _add_pairs(self, keys: Tensor, products: Tensor) -> None:
        if not self.is_dense:
            self._waiting.append(coalesced(keys, products))
            self._n_waiting += len(self._waiting[-1][0])
            if self._n_waiting > max(PAIRS_AT_ONCE, len(self._keys)):
                self._merge()
        elif keys.device.type == "cpu":
            self._sums.index_add_(0, keys, products)
        else:  # no atomics: distinct keys have no order
            keys, products = coalesced(keys, products)
            self._sums[keys] += products

    def state(self) -> dict[str, Tensor]:
        """All there is to it, by name."""
        self._merge()
        return {"gram": self._sums, "gram_keys": self._keys}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over a state."""
        self._sums = tensors["gram"].to(self._sums.device, copy=True)
        self._keys = tensors["gram_keys"].to(self._keys.device, copy=True)
        self._waiting.clear()
        self._n_waiting = 0

    def _merge(self) -> None:
        if not self._waiting:
            return
        parts = [(self._keys, self._sums), *self._waiting]
        self._keys, self._sums = coalesced(*(torch.cat([part[side] for part in parts]) for side in (0, 1)))
        self._waiting.clear()
        self._n_waiting = 0

    def dense(self) -> Tensor:
        """The whole matrix [F, F].

        Raises:
            ValueError: there are more features than are held whole.
        """
        if not self.is_dense:
            raise ValueError(f"expected a Gram matrix held whole, got {self.n_features} features as pairs")
        upper = self._sums.view(self.n_features, self.n_features).triu()
        return upper + upper.triu(1).T

    def diagonal(self) -> Tensor:
        """``sum_n a_nf^2`` [F]."""
        if self.is_dense:
            return self._sums[:: self.n_features + 1].clone()
        self._merge()
        keys = torch.arange(self.n_features, device=self._keys.device) * (self.n_features + 1)
        place = torch.searchsorted(self._keys, keys)
        on = torch.searchsorted(self._keys, keys, right=True) > place
        return self._sums.new_zeros(self.n_features).masked_scatter_(on, self._sums[place[on]])

    def product(self) -> Callable[[Tensor], Tensor]:
        """The map ``vectors [F, D] -> A^T A vectors``, of the sums as they stand; float64.

        Of a matrix held as pairs the products are made in float32, several times faster: they are right to one part
        in 10^6 of ``|A^T A| |vectors|``, which is less than an iterative solver leaves. Where a third of all pairs
        occurs and F is at most 32,768 a dense copy is faster, and takes less than pairs in both orders.
        """
        if self.is_dense:
            return self.dense().matmul
        self._merge()
        if self.n_features <= DENSE_PRODUCT_FEATURES and 6 * len(self._keys) > self.n_features**2:
            whole = self._sums.new_zeros(self.n_features**2, dtype=torch.float32)
            whole[self._keys] = self._sums.float()
            whole = whole.view(self.n_features, self.n_features)
            whole += whole.triu(1).T
            return lambda vectors: (whole @ vectors.float()).double()
        diagonal = self.diagonal()[:, None]
        bounds = torch.arange(self.n_features + 1, device=self._keys.device) * self.n_features
        columns = (self._keys % self.n_features).int()
        row_ptr = torch.searchsorted(self._keys, bounds)
        upper = SparseActs(self._sums.float(), columns, self.n_features, (self.n_features,), row_ptr)
        lower = transposed(upper)

        def product(vectors: Tensor) -> Tensor:
            narrow = vectors.float()
            return (ops.decode(upper, narrow) + ops.decode(lower, narrow)).double() - diagonal * vectors

        return product


def padded(acts: SparseActs) -> tuple[Tensor, Tensor]:
    """Values (float64) and indices (int64) [N, width]; rows shorter than the widest end in zeros."""
    if acts.row_ptr is None:
        return acts.values.detach().double(), acts.indices.long()
    lengths = acts.row_ptr.diff()
    width = int(lengths.max()) if len(lengths) else 0
    place = torch.arange(len(acts.values), device=acts.values.device) - acts.row_ptr[:-1].repeat_interleave(
        lengths
    )
    at = acts.tokens * width + place
    n = acts.n_tokens
    # Padding repeats the last index, so that pairs stay in the upper triangle.
    indices = torch.full((n * width,), acts.n_features - 1, device=at.device).index_put_(
        (at,), acts.indices.long()
    )
    values = torch.zeros(n * width, dtype=torch.float64, device=at.device)
    values.index_put_((at,), acts.values.detach().double())
    return values.view(n, width), indices.view(n, width)


def coalesced(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct keys, ascending, and the sum of the values of each, added in their order."""
    keys, order = keys.sort(stable=True)
    distinct, counts = torch.unique_consecutive(keys, return_counts=True)
    if not len(distinct):
        return distinct, values
    return distinct, torch.segment_reduce(values[order], "sum", lengths=counts)
