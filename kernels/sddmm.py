"""SDDMM: ``out[n, j] = <left[n], table[indices[n, j]]>`` at the stored entries only: the gradient of decode's values.

One program walks the entries of one row, BLOCK_K at a time (SPLIT programs share a row); the gathered rows of
``table`` are multiplied column block by column block and summed at the end. Each entry is computed by one program
from its own two rows: bitwise equal from run to run, and independent of all other entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._aot import DTYPES, aligned, case
from fasttc.kernels._gather import run_bounds
from fasttc.kernels._lang import row_offset
from fasttc.kernels._launch import AotCase, KernelConfig, config, config_table, configure, on_device

CONFIGS = config_table(config(num_warps=4, num_stages=1, BLOCK_K=8, BLOCK_D=512, SPLIT=4))
# Rows that do not start at multiples of 16 bytes are read element by element, which takes registers.
_ANY = config_table(config(num_warps=4, num_stages=1, BLOCK_K=8, BLOCK_D=256, SPLIT=4))
CANDIDATES = [  # of opt-in tuning
    config(num_warps=warps, num_stages=1, BLOCK_K=rows, BLOCK_D=columns, SPLIT=split)
    for warps, rows, columns in ((2, 4, 512), (4, 4, 1024), (4, 8, 256), (4, 16, 256), (8, 8, 1024))
    for split in (1, 2, 4)
]


@triton.jit
def _sddmm(
    left_ptr,  # [N, D]
    table_ptr,  # [F, D]
    indices_ptr,  # [N, K] or [entries], int32
    row_ptr_ptr,  # [N + 1] int64, or None
    out_ptr,  # like indices, float32
    k,
    d,
    left_stride,
    table_stride,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0)
    start, stop = run_bounds(row, row_ptr_ptr, k)
    left_row = left_ptr + row_offset(row, left_stride)
    for first in range(start + tl.program_id(1) * BLOCK_K, stop, SPLIT * BLOCK_K):
        entries = first + tl.arange(0, BLOCK_K)
        valid = entries < stop
        index = tl.load(indices_ptr + entries, mask=valid, other=0)
        rows = table_ptr + row_offset(index, table_stride)[:, None]
        products = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        for column in range(0, d, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            inside = columns < d
            left = tl.load(left_row + columns, mask=inside, other=0.0).to(tl.float32)
            block = tl.load(rows + columns[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
            products += left[None, :] * block.to(tl.float32)
        tl.store(out_ptr + entries, tl.sum(products, axis=1), mask=valid)


def launch_sddmm(
    left: Tensor,
    table: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None,
    *,
    config: KernelConfig | None = None,
) -> Tensor:
    """Products of rows at the stored entries.

    Args:
        left: [N, D], rows contiguous; float32, bfloat16 or float16.
        table: [F, D], rows contiguous.
        indices: [N, K], or [entries] with ``row_ptr``; int32, contiguous, all below F.
        row_ptr: None, or [N + 1] int64 offsets.
        config: launch parameters; the architecture's by default.

    Returns:
        Like ``indices``, float32.
    """
    if config is None:
        even = all(size % 16 == 0 for size in (left.shape[1], left.stride(0), table.stride(0)))
        config = configure(
            CONFIGS if even else _ANY,
            left.device,
            key=("sddmm", left.dtype, table.dtype, table.shape, indices.shape[1:]),
            candidates=CANDIDATES,
            run=lambda chosen: launch_sddmm(left, table, indices, row_ptr, config=chosen),
        )
    out = torch.empty(indices.shape, dtype=torch.float32, device=left.device)
    if out.numel() == 0:
        return out
    k = indices.shape[1] if row_ptr is None else 0
    with on_device(left):
        _sddmm[(left.shape[0], config["SPLIT"])](
            left,
            table,
            indices,
            row_ptr,
            out,
            k,
            left.shape[1],
            left.stride(0),
            table.stride(0),
            **config.options(),
        )
    return out


def aot_cases(d: int) -> list[AotCase]:
    """Padded and CSR products in each dtype."""
    cases = []
    for dtype in DTYPES:
        even = aligned(d, dtype)
        for layout, row_ptr in (("padded", None), ("csr", "i64")):
            pointers = {"left_ptr": dtype, "table_ptr": dtype, "indices_ptr": "i32", "out_ptr": "fp32"}
            cases.append(
                case(
                    f"sddmm {layout} {dtype}",
                    _sddmm,
                    CONFIGS if even else _ANY,
                    {**pointers, "row_ptr_ptr": row_ptr},
                    odd=("k",) if even else ("k", "d", "left_stride", "table_stride"),
                    vector_loads=even,
                )
            )
    return cases
