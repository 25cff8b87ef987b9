"""Segment: sums over the entries of each feature, the gradients of both weight matrices in one pass.

For the entries (n, j) with ``indices[n, j] = f``, in ascending (token, slot) order::

    dW_dec[f] = sum values[n, j] dy[n]          db_enc[f]     = sum gz[n, j]
    dW_enc[f] = sum gz[n, j] x[n]               dthreshold[f] = sum gt[n, j]
    count[f]  = number of entries with values[n, j] != 0

Entries are sorted by feature (stable), so that every feature is a run of consecutive entries; one program sums one
(feature, slice of D), slices being the slow grid axis so that a slice of x and dy stays in the L2 cache. Runs longer
than CUT are cut at fixed places (``_gather.py``). No atomics: bitwise equal from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._aot import DTYPES, aligned, case
from fasttc.kernels._features import (
    STREAMS,
    FeatureOrder,
    FeatureSums,
    Terms,
    feature_of_program,
    feature_pieces,
    feature_sums,
    prepare,
)
from fasttc.kernels._lang import rounded, row_offset
from fasttc.kernels._launch import AotCase, KernelConfig, cdiv, config, config_table, configure, on_device

# Runs are short (N·K / F entries: 4 to 16), so few rows at a time, few registers, many programs: what TorchRec's
# Triton TBE found to be fastest (gather width 2, at most 64 registers).
_HALF = config_table(
    config(num_warps=2, num_stages=1, BLOCK_D=512, ROWS=4, CUT=256),
    gfx942=config(num_warps=1, num_stages=1, BLOCK_D=512, ROWS=4, CUT=256),
)
_SINGLE = config_table(  # as many columns per load and lane, hence twice the warps; two warps spill on sm_100
    config(num_warps=4, num_stages=1, BLOCK_D=512, ROWS=4, CUT=256),
    gfx942=config(num_warps=2, num_stages=1, BLOCK_D=512, ROWS=4, CUT=256),
)
CANDIDATES = [  # of opt-in tuning; CUT stays, so that long runs are cut alike
    config(num_warps=warps, num_stages=1, BLOCK_D=columns, ROWS=rows, CUT=256)
    for warps, columns in ((1, 256), (2, 256), (2, 512), (4, 512), (4, 1024))
    for rows in (2, 4, 8)
]


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
    if config is None:
        dtypes = {"dec_dtype": dec_dtype, "enc_dtype": enc_dtype}
        config = configure(
            _SINGLE if terms.single else _HALF,
            device,
            key=("segment", terms.single, terms.widths, n_features),
            candidates=[] if add_to else CANDIDATES,  # adding again and again would change the sums
            run=lambda chosen: launch_segment(order, terms, **dtypes, config=chosen),
        )
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


def aot_cases(d: int) -> list[AotCase]:
    """Both gradients in one pass, each sum alone, and the pieces of long runs, in each dtype."""
    cases = []
    for dtype in DTYPES:
        even, table = aligned(d, dtype), _SINGLE if dtype == "fp32" else _HALF
        odd = () if even else ("d_dec", "d_enc", "left_stride", "right_stride")
        both = {**STREAMS, "left_ptr": dtype, "right_ptr": dtype, "theta_ptr": "fp32"}
        absent = dict.fromkeys
        decoder = {**both, **absent(("grad_ptr", "right_ptr", "theta_ptr"))}
        encoder = {**both, **absent(("value_ptr", "left_ptr", "theta_ptr"))}
        thresholds = {**encoder, **absent(("grad_ptr", "right_ptr")), "theta_ptr": "fp32"}
        vectors = {"bias_ptr": "fp32", "dtheta_ptr": "fp32", "count_ptr": "i32"}
        cases.append(case(f"segment pieces {dtype}", feature_pieces, table, both, odd=odd, vector_loads=even))
        for name, streams, add in (
            ("both", both, False),
            ("both, added", both, True),
            ("decoder", decoder, False),
            ("encoder", encoder, False),
            ("thresholds", thresholds, False),
        ):
            outputs = {
                "dec_ptr": dtype if streams["value_ptr"] else None,
                "enc_ptr": dtype if streams["grad_ptr"] else None,
                **vectors,
            }
            cases.append(
                case(
                    f"segment {name} {dtype}",
                    _segment,
                    table,
                    {**streams, **outputs},
                    odd=odd,
                    constants={"BY_ENTRY": add, "ADD": add},
                    vector_loads=even and name != "thresholds",
                )
            )
    return cases
