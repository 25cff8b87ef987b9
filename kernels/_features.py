"""Entries sorted by feature and their sums: the common ground of ``segment.py`` and ``adam.py``.

A feature is a run of consecutive sorted entries; runs are cut as ``_gather.py`` says.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._gather import full_pieces, piece_start, weighted_rows
from fasttc.kernels._lang import row_offset
from fasttc.kernels._launch import KernelConfig, cdiv

# Element types of the arguments that every kernel here has, for ahead-of-time cases.
STREAMS = {
    "feature_ptr": "i32", "ptr_ptr": "i64", "token_ptr": "i32", "value_ptr": "fp32", "grad_ptr": "fp32",
    "dec_scratch_ptr": "fp32", "enc_scratch_ptr": "fp32", "sums_scratch_ptr": "fp32",
}  # fmt: skip


@dataclass(frozen=True)
class FeatureOrder:
    """Entries sorted by (feature, position): which entry stands where, its feature, its token, where features begin.

    entry [entries] int64 · feature [entries] int32 · token [entries] int32 · ptr [F + 1] int64
    """

    entry: Tensor
    feature: Tensor
    token: Tensor
    ptr: Tensor

    @property
    def n_features(self) -> int:
        return self.ptr.shape[0] - 1


def sort_entries(indices: Tensor, row_ptr: Tensor | None, n_features: int) -> FeatureOrder:
    """Sorts the entries of ``indices`` ([N, K], or [entries] with ``row_ptr``) by feature, stably, without a sync."""
    feature, entry = torch.sort(indices.reshape(-1), stable=True)
    if row_ptr is None:
        token = entry // max(indices.shape[1], 1)
    else:
        token = torch.searchsorted(row_ptr, entry, right=True) - 1
    bounds = torch.arange(n_features + 1, dtype=feature.dtype, device=feature.device)
    return FeatureOrder(entry, feature, token.int(), torch.searchsorted(feature, bounds))


@dataclass(frozen=True)
class Terms:
    """What is summed per feature; entries in their original order, rows contiguous. None: not asked for.

    ``dW_dec`` needs values [N, K] (or [entries]) and left [N, D_out]; ``dW_enc`` grads like values and right
    [N, D_in]; ``dthreshold`` thetas like values.
    """

    values: Tensor | None = None
    left: Tensor | None = None
    grads: Tensor | None = None
    right: Tensor | None = None
    thetas: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.values is None) != (self.left is None) or (self.grads is None) != (self.right is None):
            raise ValueError("Terms: expected values with left, and grads with right")

    @property
    def widths(self) -> tuple[int, int]:
        """(D_out, D_in), 0 for one not asked for."""
        return tuple(0 if rows is None else rows.shape[1] for rows in (self.left, self.right))

    @property
    def single(self) -> bool:
        """Whether any rows are in float32."""
        return any(rows is not None and rows.dtype == torch.float32 for rows in (self.left, self.right))


@dataclass(frozen=True)
class FeatureSums:
    """The sums of :class:`Terms` per feature: [F, D_out], [F, D_in], [F] float32, [F] float32, [F] int32, or None."""

    dec: Tensor | None
    enc: Tensor | None
    bias: Tensor | None
    theta: Tensor | None
    count: Tensor | None


@triton.jit
def run_sums(
    start,
    stop,
    token_ptr,  # [entries] int32
    value_ptr,  # [entries], or None
    left_ptr,  # [N, D_out], or None with value_ptr
    left_stride,
    grad_ptr,  # [entries], or None
    right_ptr,  # [N, D_in], or None with grad_ptr
    right_stride,
    theta_ptr,  # [entries], or None
    columns,
    d_dec,
    d_enc,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums of value·left, grad·right, grad, theta and [value != 0] over sorted entries [start, stop), in order."""
    dec = tl.zeros([BLOCK_D], tl.float32)
    enc = tl.zeros([BLOCK_D], tl.float32)
    bias = tl.full([], 0.0, tl.float32)
    theta = tl.full([], 0.0, tl.float32)
    count = tl.full([], 0, tl.int32)
    for first in range(start, stop, ROWS):
        entries = first + tl.arange(0, ROWS)
        valid = entries < stop
        token = tl.load(token_ptr + entries, mask=valid, other=0)
        if value_ptr is not None:
            values = tl.load(value_ptr + entries, mask=valid, other=0.0).to(tl.float32)
            dec += weighted_rows(values, token, valid, left_ptr, left_stride, columns, d_dec)
            count += tl.sum((values != 0).to(tl.int32), axis=0)
        if grad_ptr is not None:
            grads = tl.load(grad_ptr + entries, mask=valid, other=0.0).to(tl.float32)
            enc += weighted_rows(grads, token, valid, right_ptr, right_stride, columns, d_enc)
            bias += tl.sum(grads, axis=0)
        if theta_ptr is not None:
            theta += tl.sum(tl.load(theta_ptr + entries, mask=valid, other=0.0).to(tl.float32), axis=0)
    return dec, enc, bias, theta, count


@triton.jit
def feature_pieces(
    feature_ptr,  # [entries] int32, sorted
    ptr_ptr,  # [F + 1] int64
    token_ptr,
    value_ptr,
    left_ptr,
    left_stride,
    grad_ptr,
    right_ptr,
    right_stride,
    theta_ptr,
    dec_scratch_ptr,  # [slots, D_out] float32
    enc_scratch_ptr,  # [slots, D_in] float32
    sums_scratch_ptr,  # [slots, 3] float32: bias, theta, count (exact: at most CUT)
    d_dec,
    d_enc,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    CUT: tl.constexpr,
):
    """The full pieces of long runs, one scratch row each."""
    slot = tl.program_id(0)
    feature = tl.load(feature_ptr + row_offset(slot + 1, CUT) - 1)
    first = piece_start(slot, tl.load(ptr_ptr + feature), tl.load(ptr_ptr + feature + 1), CUT)
    if first < 0:
        return
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dec, enc, bias, theta, count = run_sums(
        first,
        first + CUT,
        token_ptr,
        value_ptr,
        left_ptr,
        left_stride,
        grad_ptr,
        right_ptr,
        right_stride,
        theta_ptr,
        columns,
        d_dec,
        d_enc,
        BLOCK_D,
        ROWS,
    )
    if value_ptr is not None:
        tl.store(dec_scratch_ptr + row_offset(slot, d_dec) + columns, dec, mask=columns < d_dec)
    if grad_ptr is not None:
        tl.store(enc_scratch_ptr + row_offset(slot, d_enc) + columns, enc, mask=columns < d_enc)
    if tl.program_id(1) == 0:
        tl.store(sums_scratch_ptr + row_offset(slot, 3), bias)
        tl.store(sums_scratch_ptr + row_offset(slot, 3) + 1, theta)
        tl.store(sums_scratch_ptr + row_offset(slot, 3) + 2, tl.cast(count, tl.float32))


@triton.jit
def feature_sums(
    feature,
    ptr_ptr,
    token_ptr,
    value_ptr,
    left_ptr,
    left_stride,
    grad_ptr,
    right_ptr,
    right_stride,
    theta_ptr,
    dec_scratch_ptr,
    enc_scratch_ptr,
    sums_scratch_ptr,
    d_dec,
    d_enc,
    columns,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    CUT: tl.constexpr,
):
    """The five sums of one feature: scratch rows of its full pieces in order, then its tail."""
    start = tl.load(ptr_ptr + feature)
    stop = tl.load(ptr_ptr + feature + 1)
    pieces = full_pieces(start, stop, CUT)
    dec, enc, bias, theta, count = run_sums(
        start + pieces * CUT,
        stop,
        token_ptr,
        value_ptr,
        left_ptr,
        left_stride,
        grad_ptr,
        right_ptr,
        right_stride,
        theta_ptr,
        columns,
        d_dec,
        d_enc,
        BLOCK_D,
        ROWS,
    )
    for piece in range(pieces):
        slot = start // CUT + piece
        if value_ptr is not None:
            address = dec_scratch_ptr + row_offset(slot, d_dec) + columns
            dec += tl.load(address, mask=columns < d_dec, other=0.0)
        if grad_ptr is not None:
            address = enc_scratch_ptr + row_offset(slot, d_enc) + columns
            enc += tl.load(address, mask=columns < d_enc, other=0.0)
        sums = sums_scratch_ptr + row_offset(slot, 3)
        bias += tl.load(sums)
        theta += tl.load(sums + 1)
        count += tl.cast(tl.load(sums + 2), tl.int32)
    return dec, enc, bias, theta, count


@triton.jit
def feature_of_program(feature_ptr, BY_ENTRY: tl.constexpr):
    """The feature of a program, or -1: program numbers are features, or entries of which only a run's first counts."""
    number = tl.program_id(0)
    if BY_ENTRY:
        feature = tl.load(feature_ptr + number)
        before = tl.load(feature_ptr + number - 1, mask=number > 0, other=-1)
        number = tl.where(feature == before, -1, feature)
    return number


def prepare(order: FeatureOrder, terms: Terms, config: KernelConfig) -> tuple:
    """Sorts the terms, sums the full pieces of long runs, and returns the arguments of :func:`feature_sums` from
    ``feature_ptr`` to ``sums_scratch_ptr``."""
    sort = [
        None if t is None else t.reshape(-1)[order.entry] for t in (terms.values, terms.grads, terms.thetas)
    ]
    d_dec, d_enc = terms.widths
    device, slots = order.entry.device, order.entry.shape[0] // config["CUT"]
    streams = (
        order.token,
        sort[0],
        terms.left,
        0 if terms.left is None else terms.left.stride(0),
        sort[1],
        terms.right,
        0 if terms.right is None else terms.right.stride(0),
        sort[2],
        torch.empty(slots, d_dec, device=device),
        torch.empty(slots, d_enc, device=device),
        torch.empty(slots, 3, device=device),
    )
    if slots:
        grid = (slots, max(cdiv(max(d_dec, d_enc), config["BLOCK_D"]), 1))
        feature_pieces[grid](order.feature, order.ptr, *streams, d_dec, d_enc, **config.options())
    return (order.feature, order.ptr, *streams)
