"""Encode TopK without a scratch: what the tiles emit, a certificate per row, and an exact fallback.

Each 128-column tile of ``z = x W^T + b`` emits its T first entries by (value, lower column), and the key ``l`` of the
last of them. The k first of all emitted entries of a row, with smallest key κ, are the row's TopK if ``l < κ`` for
every tile: what a tile did not emit has a key ≤ l < κ. Such a row is *certified*. Rows that are not are encoded again
through the scratch (:mod:`fasttc.kernels.encode`), so the result is exact whatever the data.

Needs ``8·T / 128`` bytes per pre-activation instead of 4 in scratch. With k entries thrown evenly over F/128 tiles, a
row fails with T = 4 in 0.4 % of cases at F = 65536, k = 64, and in 0.05 % at F = 131072 (union bound). One
synchronisation, to learn which rows failed. Deterministic: see :mod:`fasttc.kernels.encode`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._aot import DTYPES, aligned, case
from fasttc.kernels._lang import LOWEST_KEY, key_value, order_key, row_offset, swizzled
from fasttc.kernels._launch import (
    AotCase,
    MatrixTables,
    cdiv,
    config,
    config_table,
    configure,
    dot_precision,
    on_device,
)
from fasttc.kernels.encode import launch_encode_topk, matrix_operands, rows_aligned, tile_product
from fasttc.kernels.select import launch_select

TOP = 4  # entries that a tile emits
TILE = 128  # columns of a tile

_TABLES = MatrixTables(
    half=config_table(config(8, 2, BLOCK_M=128, BLOCK_N=TILE, BLOCK_K=64, GROUP_M=8)),
    half_any=config_table(config(8, 2, BLOCK_M=64, BLOCK_N=TILE, BLOCK_K=32, GROUP_M=8)),
    single=config_table(config(8, 2, BLOCK_M=64, BLOCK_N=TILE, BLOCK_K=32, GROUP_M=8)),
)


@triton.jit
def _tile_top(
    x, stride_x,  # [N, D]
    w, stride_w,  # [F, D]
    bias,  # [F]
    values,  # [N, tiles · TOP] float32
    columns,  # [N, tiles · TOP] int32, ascending
    last,  # [N, tiles] int32: the smallest emitted key of a tile
    n_rows, n_features, d,
    PRECISION: tl.constexpr, TOP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The TOP first entries of each row of a tile by (value, lower column), stored by ascending column."""
    tiles_m = tl.cdiv(n_rows, BLOCK_M)
    tiles_n = tl.cdiv(n_features, BLOCK_N)
    tile_m, tile_n = swizzled(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    first_row = tile_m * BLOCK_M
    first_column = tile_n * BLOCK_N
    value = tile_product(
        x, stride_x, w, stride_w, first_row, first_column, n_rows, n_features, d,
        PRECISION, False, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    local = tl.arange(0, BLOCK_N)
    known = first_column + local < n_features
    value += tl.load(bias + first_column + local, mask=known, other=0.0).to(tl.float32)[None, :]
    key = tl.where(known[None, :], order_key(value), LOWEST_KEY)
    slots = tl.arange(0, TOP)
    top_key = tl.zeros([BLOCK_M, TOP], tl.int32)
    top_column = tl.zeros([BLOCK_M, TOP], tl.int32)
    smallest = tl.zeros([BLOCK_M], tl.int32)
    for turn in tl.static_range(TOP):
        smallest = tl.max(key, axis=1)
        first = tl.min(tl.where(key == smallest[:, None], local[None, :], BLOCK_N), axis=1)
        key = tl.where(local[None, :] == first[:, None], LOWEST_KEY, key)
        first = tl.where(smallest == LOWEST_KEY, BLOCK_N + turn, first)  # fewer columns than TOP in this tile
        top_key = tl.where((slots == turn)[None, :], smallest[:, None], top_key)
        top_column = tl.where((slots == turn)[None, :], first[:, None], top_column)
    earlier = top_column[:, None, :] < top_column[:, :, None]  # [row, entry, other entry]
    rank = tl.sum(earlier.to(tl.int32), axis=2)
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    at = row_offset(rows, tiles_n * TOP)[:, None] + tile_n * TOP + rank
    top_value = tl.where(top_key == LOWEST_KEY, float("-inf"), key_value(top_key))
    tl.store(values + at, top_value, mask=inside[:, None])
    tl.store(columns + at, first_column + top_column, mask=inside[:, None])
    tl.store(last + row_offset(rows, tiles_n) + tile_n, smallest, mask=inside)


def enough_emitted(n_features: int, k: int) -> bool:
    """Whether the tiles emit at least k entries of a row."""
    full, rest = divmod(n_features, TILE)
    return full * TOP + min(rest, TOP) >= k


def launch_encode_topk_certified(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    relu: bool = True,
    gemm: str = "tile",
    scratch_bytes: int = 2**26,
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row by (value, lower index), without a scratch for the rows that certify.

    Args and returns: as :func:`fasttc.kernels.encode.launch_encode_topk`, which does the other rows, within
    ``scratch_bytes``, and all of them where the tiles emit fewer than k entries.
    """
    x, W_enc = matrix_operands(x, W_enc)
    (n, d), n_features = x.shape, W_enc.shape[0]
    if not enough_emitted(n_features, k):
        return launch_encode_topk(x, W_enc, b_enc, k, relu=relu, gemm=gemm, scratch_bytes=scratch_bytes)
    even = rows_aligned(x) and rows_aligned(W_enc)
    chosen = configure(_TABLES.of(x.dtype == torch.float32, even), x.device)
    tiles = cdiv(n_features, TILE)
    emitted = torch.empty(n, tiles * TOP, dtype=torch.float32, device=x.device)
    columns = torch.empty(n, tiles * TOP, dtype=torch.int32, device=x.device)
    last = torch.empty(n, tiles, dtype=torch.int32, device=x.device)
    if n > 0:
        with on_device(x):
            _tile_top[(cdiv(n, chosen["BLOCK_M"]) * tiles,)](
                x, x.stride(0), W_enc, W_enc.stride(0), b_enc, emitted, columns, last, n, n_features, d,
                PRECISION=dot_precision(x.dtype), TOP=TOP, **chosen.options(),
            )  # fmt: skip
    values, indices, floor = launch_select([emitted], k, relu=relu, columns=columns)
    uncertain = (last >= floor[:, None]).any(1).nonzero()[:, 0]
    if uncertain.numel():
        again = launch_encode_topk(
            x[uncertain], W_enc, b_enc, k, relu=relu, gemm=gemm, scratch_bytes=scratch_bytes
        )
        values[uncertain], indices[uncertain] = again
    return values, indices


def aot_cases(d: int) -> list[AotCase]:
    """The emitting tile at width d in each dtype."""
    cases = []
    for name, size in DTYPES.items():
        pointers = {"x": name, "w": name, "bias": name, "values": "fp32", "columns": "i32", "last": "i32"}
        whole = aligned(d, name)
        cases.append(
            case(
                f"tile_top {name}",
                _tile_top,
                _TABLES.of(size == 4, whole),
                pointers,
                odd=() if whole else ("stride_x", "stride_w", "d"),
                constants={"PRECISION": "ieee", "TOP": TOP},
                vector_loads=whole,
                matrix_unit=size == 2,
            )
        )
    return cases
