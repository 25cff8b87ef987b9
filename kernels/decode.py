"""Decode: ``y[n] = sum_j values[n, j] W[indices[n, j]] (+ bias) (+ init)``, for padded rows and for CSR.

With a target the same kernel writes the residual ``e = y - target`` and ``sum_d e[n, d]^2`` instead of y.

One program computes one (row, slice of D): slices are the slow grid axis, so that a slice of the table (F=65536,
256 columns, bfloat16: 33 MB) can stay in the L2 cache while all rows use it. Sums are float32 in ascending entry
order and rows longer than CUT are cut at fixed places (``_gather.py``): bitwise equal from run to run, and
independent of the other rows and of padding with zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._aot import DTYPES, aligned, case
from fasttc.kernels._gather import add_weighted_rows, full_pieces, piece_start, row_of_entry, run_bounds
from fasttc.kernels._lang import rounded, row_offset
from fasttc.kernels._launch import AotCase, KernelConfig, cdiv, config, config_table, configure, on_device

# A warp of 32 lanes reads 256 bfloat16 columns in one 128-bit load per lane (64 lanes: 512). Left to itself, ptxas
# keeps two rows in flight (sm_90, 62 registers); two stages keep ROWS in flight, in 10 KB of shared memory.
CONFIGS = config_table(
    config(num_warps=2, num_stages=1, BLOCK_D=512, ROWS=8, STAGES=2, CUT=512),
    gfx942=config(num_warps=1, num_stages=1, BLOCK_D=512, ROWS=8, STAGES=1, CUT=512),
)
CANDIDATES = [  # of opt-in tuning; CUT stays, so that long rows are cut alike
    config(num_warps=warps, num_stages=1, BLOCK_D=columns, ROWS=rows, STAGES=stages, CUT=512)
    for warps, columns in ((1, 256), (2, 512), (4, 1024))
    for rows, stages in ((4, 2), (4, 3), (8, 1), (8, 2), (16, 1))
]


@triton.jit
def _decode_pieces(
    values_ptr,  # [N, K] or [entries]
    indices_ptr,  # like values, int32
    row_ptr_ptr,  # [N + 1] int64, or None
    table_ptr,  # [F, D]
    scratch_ptr,  # [slots, D] float32
    n_rows,
    k,
    d,
    table_stride,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    CUT: tl.constexpr,
):
    """The full pieces of long rows, one scratch row each."""
    slot = tl.program_id(0)
    row = row_of_entry(row_offset(slot + 1, CUT) - 1, row_ptr_ptr, n_rows, k)
    start, stop = run_bounds(row, row_ptr_ptr, k)
    first = piece_start(slot, start, stop, CUT)
    if first < 0:
        return
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    total = tl.zeros([BLOCK_D], tl.float32)
    total = add_weighted_rows(
        total, values_ptr, indices_ptr, table_ptr, table_stride, first, first + CUT, columns, d, ROWS, STAGES
    )
    tl.store(scratch_ptr + row_offset(slot, d) + columns, total, mask=inside)


@triton.jit
def _decode(
    values_ptr,  # [N, K] or [entries]
    indices_ptr,  # like values, int32
    row_ptr_ptr,  # [N + 1] int64, or None
    table_ptr,  # [F, D]
    scratch_ptr,  # [slots, D] float32
    bias_ptr,  # [D], or None
    init_ptr,  # [N, D], or None
    target_ptr,  # [N, D], or None
    out_ptr,  # [N, D]
    square_ptr,  # [N, slices] float32, with a target
    k,
    d,
    table_stride,
    init_stride,
    target_stride,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    CUT: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    start, stop = run_bounds(row, row_ptr_ptr, k)
    pieces = full_pieces(start, stop, CUT)
    total = tl.zeros([BLOCK_D], tl.float32)
    for piece in range(pieces):
        total += tl.load(scratch_ptr + row_offset(start // CUT + piece, d) + columns, mask=inside, other=0.0)
    total = add_weighted_rows(
        total,
        values_ptr,
        indices_ptr,
        table_ptr,
        table_stride,
        start + pieces * CUT,
        stop,
        columns,
        d,
        ROWS,
        STAGES,
    )
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if init_ptr is not None:
        address = init_ptr + row_offset(row, init_stride) + columns
        total += tl.load(address, mask=inside, other=0.0).to(tl.float32)
    if target_ptr is not None:
        address = target_ptr + row_offset(row, target_stride) + columns
        total -= tl.load(address, mask=inside, other=0.0).to(tl.float32)
        square = tl.sum(tl.where(inside, total * total, 0.0), axis=0)
        tl.store(square_ptr + row_offset(row, tl.num_programs(1)) + tl.program_id(1), square)
    out = rounded(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_offset(row, d) + columns, out, mask=inside)


def launch_decode(
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None,
    table: Tensor,
    *,
    bias: Tensor | None = None,
    init: Tensor | None = None,
    target: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Decodes rows of ``table``.

    Args:
        values: [N, K], or [entries] with ``row_ptr``; float32, bfloat16 or float16, contiguous.
        indices: like values, int32, all below F.
        row_ptr: None, or [N + 1] int64 offsets.
        table: [F, D], rows contiguous.
        bias: [D]. init, target: [N, D], rows contiguous.
        dtype: of the result.
        config: launch parameters; the architecture's by default.

    Returns:
        (y, None), or with a target (y - target [N, D], the sum of its squares per row [N] float32).
    """
    if config is None:
        options = {"bias": bias, "init": init, "target": target, "dtype": dtype}
        config = configure(
            CONFIGS,
            table.device,
            key=("decode", table.dtype, table.shape, values.shape[1:], target is None),
            candidates=CANDIDATES,
            run=lambda chosen: launch_decode(values, indices, row_ptr, table, **options, config=chosen),
        )
    n_rows = values.shape[0] if row_ptr is None else row_ptr.shape[0] - 1
    k = values.shape[1] if row_ptr is None else 0
    d, entries = table.shape[1], values.numel()
    slices = cdiv(d, config["BLOCK_D"])
    out = torch.empty(n_rows, d, dtype=dtype, device=table.device)
    squares = None if target is None else torch.empty(n_rows, slices, device=table.device)
    if n_rows == 0 or d == 0:
        return out, None if squares is None else squares.sum(-1)
    may_be_long = row_ptr is not None or k > config["CUT"]
    slots = entries // config["CUT"] if may_be_long else 0
    scratch = torch.empty(slots, d, device=table.device)
    with on_device(table):
        if slots:
            _decode_pieces[(slots, slices)](
                values,
                indices,
                row_ptr,
                table,
                scratch,
                n_rows,
                k,
                d,
                table.stride(0),
                **config.options(),
            )
        _decode[(n_rows, slices)](
            values,
            indices,
            row_ptr,
            table,
            scratch,
            bias,
            init,
            target,
            out,
            squares,
            k,
            d,
            table.stride(0),
            0 if init is None else init.stride(0),
            0 if target is None else target.stride(0),
            **config.options(),
        )
    return out, None if squares is None else squares.sum(-1)


def aot_cases(d: int) -> list[AotCase]:
    """Padded and CSR decode in each dtype, with every epilogue on the CSR one, and the pieces of long rows."""
    cases = []
    for dtype in DTYPES:
        odd = ("n_rows", "k") if aligned(d, dtype) else ("n_rows", "k", "d", "table_stride")
        entries = {"values_ptr": "fp32", "indices_ptr": "i32", "table_ptr": dtype, "scratch_ptr": "fp32"}
        epilogue = dict.fromkeys(("bias_ptr", "init_ptr", "target_ptr", "square_ptr"))
        for layout, row_ptr, rows in (
            ("padded", None, epilogue),
            ("csr residual", "i64", dict.fromkeys(epilogue, dtype)),
        ):
            rows = {**rows, "square_ptr": None if row_ptr is None else "fp32", "out_ptr": "fp32"}
            strides = odd if aligned(d, dtype) else (*odd, "init_stride", "target_stride")
            cases.append(
                case(
                    f"decode {layout} {dtype}",
                    _decode,
                    CONFIGS,
                    {**entries, "row_ptr_ptr": row_ptr, **rows},
                    odd=strides,
                    vector_loads=aligned(d, dtype),
                )
            )
        pieces = {**entries, "row_ptr_ptr": "i64"}
        cases.append(
            case(
                f"decode pieces {dtype}",
                _decode_pieces,
                CONFIGS,
                pieces,
                odd=odd,
                vector_loads=aligned(d, dtype),
            )
        )
    return cases
