"""Encode BatchTopK (Bussmann et al. 2024): the N·k largest pre-activations of the whole batch, as CSR.

    selected = the N·k entries (n, f) first in the order (z_nf descending, n ascending, f ascending)

Rows come in chunks of a bounded scratch, and a list holds the best N·k entries of the rows so far. From a chunk only
entries that can still win are taken: with q = N·k, those that reach

    κ = the q-th largest group maximum of the chunk   (q groups hold q elements ≥ κ, so a winner reaches κ),

and, once the list is full, exceed its last value (an equal entry of a later row loses). Both bounds are order keys,
found exactly by radix selection on the device; the entries are taken by :mod:`fasttc.kernels.threshold`. A full list
is cut back to its N·k first by one more radix selection, ties by position. Exact, ties included, and deterministic.
"""

import torch
from torch import Tensor

from fasttc.kernels._launch import KernelConfig
from fasttc.kernels.encode import SCRATCH_BYTES, Chunk, launch_pre_activations, matrix_operands, row_chunks
from fasttc.kernels.radix import kth_key
from fasttc.kernels.select import padded
from fasttc.kernels.threshold import Rows, joined, launch_compact

_LOWEST = -(2**31) + 1  # a key that every number reaches


def launch_encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    relu: bool = True,
    gemm: str = "tile",
    config: KernelConfig | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Rows:
    """N·k entries as CSR, indices ascending in a row; ReLU applied if asked.

    Args:
        x: [N, D], W_enc: [F, D], b_enc: [F]; float16, bfloat16 or float32.
        k: mean entries per row, 1 ≤ k ≤ F.
        gemm, config, scratch_bytes: see :func:`fasttc.kernels.encode.launch_encode_topk`.
    """
    x, W_enc = matrix_operands(x, W_enc)
    n, n_features = x.shape[0], W_enc.shape[0]
    quota = n * k
    best = Rows(
        torch.empty(0, dtype=torch.float32, device=x.device),
        torch.empty(0, dtype=torch.int32, device=x.device),
        torch.zeros(1, dtype=torch.int64, device=x.device),
    )
    scratch, last = None, None
    for rows in row_chunks(n, n_features, scratch_bytes):
        if scratch is None:
            shape = (rows.stop - rows.start, padded(n_features))
            scratch = torch.empty(shape, dtype=torch.float32, device=x.device)
        chunk = launch_pre_activations(x[rows], W_enc, b_enc, gemm=gemm, config=config, scratch=scratch)
        found = launch_compact(chunk, floor=_bound(chunk, quota, last))
        best = found if rows.start == 0 else joined([best, found])
        if best.values.shape[0] >= quota:
            best, last = _first(best, quota)
    values = torch.where(best.values < 0, 0.0, best.values) if relu else best.values
    return Rows(values, best.indices, best.row_ptr)


def _bound(chunk: Chunk, quota: int, last: Tensor | None) -> Tensor:
    """int32 key [1] that an entry of the chunk must reach to be among the quota first."""
    bound = torch.full((1,), _LOWEST, dtype=torch.int64, device=chunk.z.device)
    if chunk.maxima.numel() >= quota:
        bound = kth_key(_dense(chunk.maxima), quota).long().reshape(1)
    elif chunk.bias is None and chunk.z.numel() > quota:
        bound = kth_key(_dense(chunk.z), quota).long().reshape(1)
    if last is not None:
        bound = torch.maximum(bound, last.long().reshape(1) + 1)
    return bound.clamp(max=2**31 - 1).int()


def _dense(level: Tensor) -> Tensor:
    return level if level.is_contiguous() else level.contiguous()


def _first(rows: Rows, quota: int) -> tuple[Rows, Tensor]:
    """The quota first entries by (value, position), in place order, and the key of the last of them."""
    last = kth_key(rows.values, quota)
    key = order_keys(rows.values)
    above, equal = key > last, key == last
    kept = above | (equal & (equal.cumsum(0) <= quota - above.sum()))
    rank = kept.cumsum(0)
    slot = torch.where(kept, rank - 1, quota)  # what is not kept lands in one slot past the end
    values = rows.values.new_empty(quota + 1).scatter_(0, slot, rows.values)[:quota]
    indices = rows.indices.new_empty(quota + 1).scatter_(0, slot, rows.indices)[:quota]
    row_ptr = torch.cat([rank.new_zeros(1), rank])[rows.row_ptr]
    return Rows(values, indices, row_ptr), last


def order_keys(values: Tensor) -> Tensor:
    """int32 keys that compare like float32 values, as :func:`fasttc.kernels._lang.order_key`."""
    bits = (values + 0.0).view(torch.int32)
    key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return torch.where(values.isnan(), 2**31 - 1, key)
