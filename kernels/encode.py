"""Encode: pre-activations tile by tile, with what an exact selection needs, and never [N, F] at once.

    z_nf = <x_n, W_f> + b_f            (float32 sums, float32 z, -0 stored as +0)
    m_ng = max over the 16 columns f of group g of z_nf - s_f

``_pre_activations`` stores z and m for a chunk of rows into a bounded scratch; :mod:`fasttc.kernels.select` (TopK),
:mod:`fasttc.kernels.threshold` (JumpReLU, ReLU) and :mod:`fasttc.kernels.batch` (BatchTopK) read the few groups that
matter. The same scratch can be filled by the vendor's GEMM instead (``gemm="vendor"``), at the price of reading it
once more for m. Selection costs the same either way.

Where even the scratch is too much, :mod:`fasttc.kernels.certificate` does without.

Determinism: a z is one dot product in one program, in a fixed order over D: bitwise the same from run to run, and,
for a fixed config of our own GEMM, whatever batch its token comes in. The vendor's GEMM promises only the former.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._aot import DTYPES, aligned, case
from fasttc.kernels._lang import GROUP, canonical, dot, row_offset, swizzled
from fasttc.kernels._launch import (
    AotCase,
    ConfigTable,
    KernelConfig,
    MatrixTables,
    cdiv,
    config_table,
    configure,
    dot_precision,
    multiprocessors,
    on_device,
)
from fasttc.kernels._launch import config as _config
from fasttc.kernels.select import group_maximum, launch_group_max, launch_select, level_sizes, padded

SCRATCH_BYTES = 2**30

_TABLES = MatrixTables(
    # sm_90 and sm_100 read tiles through tensor descriptors (TMA) and keep one program per multiprocessor; the others
    # read through pointers. sm_80's tile also fits the 99 KB of sm_86 and sm_89.
    half=config_table(
        _config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, DESCRIPTOR=False, PARTS=1),
        sm_90=_config(8, 4, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, DESCRIPTOR=True, PARTS=4),
        sm_100=_config(8, 4, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, DESCRIPTOR=True, PARTS=4),
        gfx942=_config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, DESCRIPTOR=False, PARTS=1),
    ),
    half_any=config_table(
        _config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, DESCRIPTOR=False, PARTS=1)
    ),
    # Multiply-adds outside the matrix units unless TF32 is allowed, hence small tiles.
    single=config_table(
        _config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, DESCRIPTOR=False, PARTS=1)
    ),
)


@triton.jit
def tile_product(
    x, stride_x,  # [N, D], or its descriptor
    w, stride_w,  # [F, D], or its descriptor
    first_row, first_column, n_rows, n_features, d,
    PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``x W^T`` [BLOCK_M, BLOCK_N] of one tile, float32. Rows past the end repeat the last one (masked later)."""
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIPTOR:
        for k in range(0, d, BLOCK_K):
            accumulator = dot(x.load([first_row, k]), w.load([first_column, k]).T, accumulator, PRECISION)
    else:
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), n_rows - 1)
        columns = tl.minimum(first_column + tl.arange(0, BLOCK_N), n_features - 1)
        inner = tl.arange(0, BLOCK_K)
        x_tile = x + row_offset(rows, stride_x)[:, None] + inner[None, :]
        w_tile = w + row_offset(columns, stride_w)[:, None] + inner[None, :]
        for k in range(0, d, BLOCK_K):
            inside = (k + inner < d)[None, :]
            a = tl.load(x_tile + k, mask=inside, other=0.0)
            b = tl.load(w_tile + k, mask=inside, other=0.0)
            accumulator = dot(a, b.T, accumulator, PRECISION)
    return accumulator


@triton.jit
def _finish(
    value, bias, shift, z, stride_z, maxima, stride_m,
    first_row, first_column, n_rows, n_features, n_columns,
    DESCRIPTOR: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds the bias to WIDTH columns of a tile and stores them and their group maxima, in PARTS pieces.

    Pieces keep small the shared memory through which the tile changes from the matrix unit's layout to rows, so that
    the next tile's loads can stay in flight.
    """
    if PARTS > 1:
        left, right = tl.split(tl.permute(tl.reshape(value, [BLOCK_M, 2, WIDTH // 2]), (0, 2, 1)))
        _finish(
            left, bias, shift, z, stride_z, maxima, stride_m, first_row, first_column,
            n_rows, n_features, n_columns, DESCRIPTOR, BLOCK_M, WIDTH // 2, PARTS // 2,
        )  # fmt: skip
        _finish(
            right, bias, shift, z, stride_z, maxima, stride_m, first_row, first_column + WIDTH // 2,
            n_rows, n_features, n_columns, DESCRIPTOR, BLOCK_M, WIDTH // 2, PARTS // 2,
        )  # fmt: skip
    else:
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, WIDTH)
        known = columns < n_features
        value += tl.load(bias + columns, mask=known, other=0.0).to(tl.float32)[None, :]
        value = tl.where(known[None, :], canonical(value), float("-inf"))
        inside = (rows < n_rows)[:, None]
        if DESCRIPTOR:
            z.store([first_row, first_column], value)
        else:
            at = z + row_offset(rows, stride_z)[:, None] + columns[None, :]
            tl.store(at, value, mask=inside & (columns < n_columns)[None, :])
        if shift is not None:
            value -= tl.load(shift + columns, mask=known, other=0.0).to(tl.float32)[None, :]
        best = group_maximum(value, BLOCK_M, WIDTH // GROUP)
        groups = first_column // GROUP + tl.arange(0, WIDTH // GROUP)
        at = maxima + row_offset(rows, stride_m)[:, None] + groups[None, :]
        tl.store(at, best, mask=inside & (groups * GROUP < n_columns)[None, :])


@triton.jit
def _pre_activations(
    x, stride_x,  # [N, D], or its descriptor
    w, stride_w,  # [F, D], or its descriptor
    bias,  # [F]
    shift,  # [F] or None
    z, stride_z,  # [N, >= F] float32, or its descriptor
    maxima, stride_m,  # [N, >= ceil(F / 16)] float32
    n_rows, n_features, n_columns, d,
    PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """z and its group maxima. Columns F..n_columns, which fill the last group, get -inf."""
    tiles_m = tl.cdiv(n_rows, BLOCK_M)
    tiles_n = tl.cdiv(n_columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=DESCRIPTOR):
        tile_m, tile_n = swizzled(tile, tiles_m, tiles_n, GROUP_M)
        first_row = tile_m * BLOCK_M
        first_column = tile_n * BLOCK_N
        value = tile_product(
            x, stride_x, w, stride_w, first_row, first_column, n_rows, n_features, d,
            PRECISION, DESCRIPTOR, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _finish(
            value, bias, shift, z, stride_z, maxima, stride_m, first_row, first_column,
            n_rows, n_features, n_columns, DESCRIPTOR, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """Pre-activations of a chunk of rows, as the selections read them.

    Attributes:
        z: [R, F] float32, row stride a multiple of 16.
        maxima: [R, ceil(F/16)] float32, of ``z (+ bias) - shift``, row stride a multiple of 16.
        bias: [F], still to be added to z; None where z has it.
    """

    z: Tensor
    maxima: Tensor
    bias: Tensor | None


def row_chunks(n_rows: int, n_features: int, scratch_bytes: int) -> list[slice]:
    """Equal slices of the rows, each a multiple of 128 rows (but the last), whose z fits the scratch."""
    most = max(128, scratch_bytes // (4 * padded(n_features)) // 128 * 128)
    count = cdiv(n_rows, most)
    size = cdiv(cdiv(n_rows, max(count, 1)), 128) * 128
    return [slice(first, min(first + size, n_rows)) for first in range(0, n_rows, max(size, 1))]


def matrix_operands(x: Tensor, W_enc: Tensor) -> tuple[Tensor, Tensor]:
    """Both matrices in their common dtype (float32 unless both are the same half precision), rows contiguous."""
    dtype = torch.promote_types(x.dtype, W_enc.dtype)
    x, W_enc = x.to(dtype), W_enc.to(dtype)
    return (x if x.stride(-1) == 1 else x.contiguous()), (
        W_enc if W_enc.stride(-1) == 1 else W_enc.contiguous()
    )


def rows_aligned(matrix: Tensor) -> bool:
    """Whether rows start at 16 bytes: what a tensor descriptor, and a 128-bit load, need."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def _table(x: Tensor, W_enc: Tensor) -> ConfigTable:
    return _TABLES.of(x.dtype == torch.float32, rows_aligned(x) and rows_aligned(W_enc))


def launch_pre_activations(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    shift: Tensor | None = None,
    gemm: str = "tile",
    config: KernelConfig | None = None,
    scratch: Tensor | None = None,
) -> Chunk:
    """z and group maxima of all rows of x.

    Args:
        x: [R, D]; W_enc: [F, D]; same dtype, unit column stride (:func:`matrix_operands`). b_enc: [F].
        shift: [F], subtracted from z in the maxima only; or None.
        gemm: "tile" (ours, epilogue fused) or "vendor" (cuBLAS, hipBLASLt, or MKL, then one pass for the maxima).
        config: of our GEMM; the architecture's by default.
        scratch: [>= R, >= padded(F)] float32 to be written instead of fresh memory.
    """
    (rows, d), n_features = x.shape, W_enc.shape[0]
    width = padded(n_features)
    if scratch is None:
        scratch = torch.empty(rows, width, dtype=torch.float32, device=x.device)
    z = scratch[:rows, :n_features]
    if gemm == "vendor":
        _vendor_product(x, W_enc, z)
        return Chunk(z, launch_group_max(z, n_features, bias=b_enc, shift=shift), b_enc)
    groups = cdiv(n_features, 16)
    maxima = torch.empty(rows, padded(groups), dtype=torch.float32, device=x.device)

    def run(chosen: KernelConfig) -> None:
        _run_tiles(x, W_enc, b_enc, shift, scratch, maxima, rows, n_features, width, d, chosen)

    key = ("pre_activations", x.dtype, rows, n_features, d)
    run(config or configure(_table(x, W_enc), x.device, key=key, candidates=_candidates(x, W_enc), run=run))
    return Chunk(z, maxima[:, :groups], None)


def _candidates(x: Tensor, W_enc: Tensor) -> list[KernelConfig]:
    """Tiles worth timing when tuning is asked for."""
    if _table(x, W_enc) is not _TABLES.half:
        return []
    shapes = [(128, 128), (128, 256), (256, 128), (64, 256)]
    return [
        _config(8, stages, BLOCK_M=m, BLOCK_N=n, BLOCK_K=64, GROUP_M=8, DESCRIPTOR=descriptor, PARTS=n // 64)
        for m, n in shapes
        for stages in (3, 4)
        for descriptor in ((False, True) if x.is_cuda and torch.version.hip is None else (False,))
    ]


def _run_tiles(x, W_enc, b_enc, shift, scratch, maxima, rows, n_features, width, d, chosen) -> None:
    if rows == 0:
        return
    tiles = cdiv(rows, chosen["BLOCK_M"]) * cdiv(width, chosen["BLOCK_N"])
    x_tile, w_tile, z_tile = x, W_enc, scratch
    if chosen["DESCRIPTOR"]:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x_tile = TensorDescriptor.from_tensor(x, [chosen["BLOCK_M"], chosen["BLOCK_K"]])
        w_tile = TensorDescriptor.from_tensor(W_enc, [chosen["BLOCK_N"], chosen["BLOCK_K"]])
        z_tile = TensorDescriptor.from_tensor(
            scratch[:rows], [chosen["BLOCK_M"], chosen["BLOCK_N"] // chosen["PARTS"]]
        )
        tiles = min(tiles, multiprocessors(x.device))  # each program walks over tiles
    with on_device(x):
        _pre_activations[(tiles,)](
            x_tile, x.stride(0), w_tile, W_enc.stride(0), b_enc, shift,
            z_tile, scratch.stride(0), maxima, maxima.stride(0), rows, n_features, width, d,
            PRECISION=dot_precision(x.dtype), **chosen.options(),
        )  # fmt: skip


def _vendor_product(x: Tensor, W_enc: Tensor, z: Tensor) -> None:
    """``z = x W^T`` in float32 by PyTorch's GEMM. On a CPU half precision is widened, for it has no such GEMM."""
    if x.dtype == torch.float32:
        torch.mm(x, W_enc.T, out=z)
    elif x.is_cuda:
        torch.mm(x, W_enc.T, out_dtype=torch.float32, out=z)
    else:
        torch.mm(x.float(), W_enc.float().T, out=z)


def launch_encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    relu: bool = True,
    gemm: str = "tile",
    config: KernelConfig | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row by (value, lower index), ReLU applied if asked.

    Args:
        x: [N, D], W_enc: [F, D], b_enc: [F]; float16, bfloat16 or float32.
        gemm: "tile" or "vendor", see :func:`launch_pre_activations`.
        scratch_bytes: bound of the scratch that z of a chunk of rows lives in (at least 128 rows).

    Returns:
        values [N, k] float32 and indices [N, k] int32, ascending in a row.
    """
    x, W_enc = matrix_operands(x, W_enc)
    n, n_features = x.shape[0], W_enc.shape[0]
    values = torch.empty(n, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(n, k, dtype=torch.int32, device=x.device)
    scratch = None
    for rows in row_chunks(n, n_features, scratch_bytes):
        if scratch is None:
            shape = (rows.stop - rows.start, padded(n_features))
            scratch = torch.empty(shape, dtype=torch.float32, device=x.device)
        chunk = launch_pre_activations(x[rows], W_enc, b_enc, gemm=gemm, config=config, scratch=scratch)
        levels = [chunk.z, chunk.maxima]
        for size in level_sizes(n_features, k)[1:-1]:
            levels.append(launch_group_max(levels[-1], size))
        launch_select(levels, k, relu=relu, bias=chunk.bias, out=(values[rows], indices[rows]))
    return values, indices


def aot_cases(d: int) -> list[AotCase]:
    """The GEMM at width d in each dtype, with and without a shift."""
    cases = []
    for name, size in DTYPES.items():
        whole = aligned(d, name)
        for shift in (None, "fp32"):
            plain = case(
                f"pre_activations {name}{' shifted' if shift else ''}",
                _pre_activations,
                _TABLES.of(size == 4, whole),
                {"x": name, "w": name, "bias": name, "shift": shift, "z": "fp32", "maxima": "fp32"},
                odd=() if whole else ("stride_x", "stride_w", "d"),
                constants={"PRECISION": "ieee"},
                vector_loads=whole,
                matrix_unit=size == 2,
            )
            tiles = {
                "x": _tile(name, "BLOCK_M"),
                "w": _tile(name, "BLOCK_N"),
                "z": _tile("fp32", "BLOCK_M", False),
            }
            cases.append(replace(plain, signature={**plain.signature, **tiles}))
    return cases


def _tile(dtype: str, rows: str, operand: bool = True) -> Callable[[KernelConfig], str]:
    """The type of x, W or z: a pointer, or a descriptor of the blocks that the config reads and writes."""

    def spell(chosen: KernelConfig) -> str:
        if not chosen["DESCRIPTOR"]:
            return f"*{dtype}"
        width = chosen["BLOCK_K"] if operand else chosen["BLOCK_N"] // chosen["PARTS"]
        return f"tensordesc<{dtype}[{chosen[rows]},{width}]>"

    return spell
