"""Segment: sums over the entries of each feature, the gradients of both weight matrices in one pass.

For the entries (n, j) with ``indices[n, j] = f``, in ascending (token, slot) order::

    dW_dec[f] = sum values[n, j] dy[n]          db_enc[f]     = sum gz[n, j]
    dW_enc[f] = sum gz[n, j] x[n]               dthreshold[f] = sum gt[n, j]
    count[f]  = number of entries with values[n, j] != 0

Entries are sorted by feature (stable), so that every feature is a run of consecutive entries; one program sums one
(feature, slice of D), slices being the slow grid axis so that a slice of x and dy stays in the L2 cache. Runs longer
than CUT are cut at fixed places (``_gather.py``). No atomics: bitwise equal from run to run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._aot import DTYPES, aligned, case
from fasttc.kernels._gather import full_pieces, piece_start, weighted_rows
from fasttc.kernels._lang import rounded, row_offset
from fasttc.kernels._launch import AotCase, KernelConfig, cdiv, config, config_table, configure, on_device

# Runs are short (N·K / F entries: 4 to 16), so few rows at a time, few registers, many programs: what TorchRec's
# Triton TBE found to be fastest (gather width 2, at most 64 registers).
CONFIGS = config_table(
    config(num_warps=2, num_stages=1, BLOCK_D=512, ROWS=4, CUT=256),
    gfx942=config(num_warps=1, num_stages=1, BLOCK_D=512, ROWS=4, CUT=256),
)


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
def _pieces(
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


@triton.jit
def _add_row(out_ptr, feature, d, columns, total, ADD: tl.constexpr):
    address = out_ptr + row_offset(feature, d) + columns
    if ADD:
        total += tl.load(address, mask=columns < d, other=0.0).to(tl.float32)
    tl.store(address, rounded(total, out_ptr.dtype.element_ty), mask=columns < d)


@triton.jit
def _segment(
    feature_ptr,  # [entries] int32, sorted
    ptr_ptr,  # [F + 1] int64
    token_ptr,  # [entries] int32
    value_ptr,  # [entries], or None
    left_ptr,  # [N, D_out], or None
    left_stride,
    grad_ptr,  # [entries], or None
    right_ptr,  # [N, D_in], or None
    right_stride,
    theta_ptr,  # [entries], or None
    dec_scratch_ptr,
    enc_scratch_ptr,
    sums_scratch_ptr,
    dec_ptr,  # [F, D_out], with value_ptr
    enc_ptr,  # [F, D_in], with grad_ptr
    bias_ptr,  # [F] float32, with grad_ptr
    dtheta_ptr,  # [F] float32, with theta_ptr
    count_ptr,  # [F] int32, with value_ptr
    d_dec,
    d_enc,
    BY_ENTRY: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    CUT: tl.constexpr,
):
    """One feature, one slice. ADD: touched rows are added to what is there, all others are left alone."""
    feature = feature_of_program(feature_ptr, BY_ENTRY)
    if feature < 0:
        return
    if ADD:
        unused = tl.load(ptr_ptr + feature) == tl.load(ptr_ptr + feature + 1)
        if unused:
            return
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dec, enc, bias, theta, count = feature_sums(
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
        BLOCK_D,
        ROWS,
        CUT,
    )
    if value_ptr is not None:
        _add_row(dec_ptr, feature, d_dec, columns, dec, ADD)
    if grad_ptr is not None:
        _add_row(enc_ptr, feature, d_enc, columns, enc, ADD)
    if tl.program_id(1) == 0:
        if value_ptr is not None:
            tl.store(count_ptr + feature, count)
        if grad_ptr is not None:
            tl.store(bias_ptr + feature, bias)
        if theta_ptr is not None:
            tl.store(dtheta_ptr + feature, theta)


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
        _pieces[grid](order.feature, order.ptr, *streams, d_dec, d_enc, **config.options())
    return (order.feature, order.ptr, *streams)


def launch_segment(
    order: FeatureOrder,
    terms: Terms,
    *,
    dec_dtype: torch.dtype = torch.float32,
    enc_dtype: torch.dtype = torch.float32,
    add_to: tuple[Tensor | None, Tensor | None] | None = None,
    config: KernelConfig | None = None,
) -> FeatureSums:
    """Sums the terms of every feature.

    Args:
        order: from :func:`sort_entries`.
        terms: what to sum.
        dec_dtype, enc_dtype: of new gradients.
        add_to: gradients of (W_dec, W_enc), rows contiguous, to add to in place; rows of features without an entry
            are not touched. None: new ones, with zeros for such features.
        config: launch parameters; the architecture's by default.

    Returns:
        The sums; ``bias``, ``theta`` and ``count`` are always those of this call alone.
    """
    device, n_features = order.entry.device, order.n_features
    config = config or configure(CONFIGS, device)
    d_dec, d_enc = terms.widths
    dec, enc = add_to or (None, None)
    if terms.values is not None and dec is None:
        dec = torch.empty(n_features, d_dec, dtype=dec_dtype, device=device)
    if terms.grads is not None and enc is None:
        enc = torch.empty(n_features, d_enc, dtype=enc_dtype, device=device)
    asked = (terms.grads, torch.float32), (terms.thetas, torch.float32), (terms.values, torch.int32)
    vectors = [
        None if t is None else torch.zeros(n_features, dtype=dtype, device=device) for t, dtype in asked
    ]
    entries = order.entry.shape[0]
    by_entry = add_to is not None and entries < n_features
    programs = entries if by_entry else n_features
    if programs:
        with on_device(order.entry):
            _segment[(programs, max(cdiv(max(d_dec, d_enc), config["BLOCK_D"]), 1))](
                *prepare(order, terms, config),
                dec,
                enc,
                *vectors,
                d_dec,
                d_enc,
                BY_ENTRY=by_entry,
                ADD=add_to is not None,
                **config.options(),
            )
    return FeatureSums(dec, enc, *vectors)


STREAMS = {
    "feature_ptr": "i32", "ptr_ptr": "i64", "token_ptr": "i32", "value_ptr": "fp32", "grad_ptr": "fp32",
    "dec_scratch_ptr": "fp32", "enc_scratch_ptr": "fp32", "sums_scratch_ptr": "fp32",
}  # fmt: skip


def aot_cases(d: int) -> list[AotCase]:
    """Both gradients in one pass, one gradient alone, and the pieces of long runs, in each dtype."""
    cases = []
    for dtype in DTYPES:
        even = aligned(d, dtype)
        odd = () if even else ("d_dec", "d_enc", "left_stride", "right_stride")
        both = {**STREAMS, "left_ptr": dtype, "right_ptr": dtype, "theta_ptr": "fp32"}
        decoder = {**both, "grad_ptr": None, "right_ptr": None, "theta_ptr": None}
        vectors = {"bias_ptr": "fp32", "dtheta_ptr": "fp32", "count_ptr": "i32"}
        cases.append(case(f"segment pieces {dtype}", _pieces, CONFIGS, both, odd=odd, vector_loads=even))
        for name, streams, add in (
            ("both", both, False),
            ("both, added", both, True),
            ("decoder", decoder, False),
        ):
            outputs = {"dec_ptr": dtype, "enc_ptr": dtype if streams is both else None, **vectors}
            cases.append(
                case(
                    f"segment {name} {dtype}",
                    _segment,
                    CONFIGS,
                    {**streams, **outputs},
                    odd=odd,
                    constants={"BY_ENTRY": add, "ADD": add},
                    vector_loads=even,
                )
            )
    return cases
