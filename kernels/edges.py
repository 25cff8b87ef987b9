"""Edges: ``E[b, j] = activations[j] <G[b, positions[j]], W_dec[features[j]]>``, grouped by token.

The entries of one token share the rows G[:, t], so each group is a product [B, D] x [D, n_t] whose right operand is
gathered row by row from W_dec where it lies: neither [B, n, D] nor a copy of the decoder rows ever exists. A tile
covers BLOCK_J entries of one token; since no token holds a fixed number of entries, ``n / BLOCK_J + T`` tiles are
launched and those beyond the last one return at once: no count has to reach the host.

With target positions, a tile whose targets all lie before its token writes zeros without reading anything (causality
makes those products zero); sort the batch by position to make such tiles common.

float32 accumulation in ascending D: bitwise equal from run to run, and an edge depends on its own rows only. float32
operands are multiplied to float32 accuracy, unless ``torch.set_float32_matmul_precision`` allows less.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._aot import DTYPES, aligned, case
from fasttc.kernels._lang import dot, row_offset
from fasttc.kernels._launch import (
    AotCase,
    KernelConfig,
    MatrixTables,
    cdiv,
    config,
    config_table,
    configure,
    dot_precision,
    on_device,
)

_TABLES = MatrixTables(
    half=config_table(config(4, 3, BLOCK_B=64, BLOCK_J=64, BLOCK_D=64, PRECISION="ieee")),
    half_any=config_table(config(8, 2, BLOCK_B=64, BLOCK_J=64, BLOCK_D=32, PRECISION="ieee")),
    # float32 as three TF32 products: within a few float32 roundings of the exact product (the dropped term is 2^-22 of
    # it), on the matrix unit. Larger tiles spill on sm_80.
    single=config_table(
        config(4, 3, BLOCK_B=64, BLOCK_J=32, BLOCK_D=32, PRECISION="tf32x3"),
        gfx942=config(4, 2, BLOCK_B=64, BLOCK_J=32, BLOCK_D=32, PRECISION="ieee"),
    ),
)
CANDIDATES = [  # of opt-in tuning, in half precision
    config(warps, stages, BLOCK_B=targets, BLOCK_J=entries, BLOCK_D=columns, PRECISION="ieee")
    for warps, targets, entries, columns in (
        (4, 64, 32, 64),
        (4, 128, 64, 64),
        (8, 128, 64, 64),
        (4, 64, 64, 32),
    )
    for stages in (2, 3, 4)
]


@triton.jit
def _edges(
    g_ptr,  # [B, T, D]
    table_ptr,  # [F, D]
    features_ptr,  # [n] int32
    activations_ptr,  # [n] float32
    targets_ptr,  # [B] positions of the targets, or None
    tile_token_ptr,  # [tiles] int32: T for a tile beyond the last
    tile_start_ptr,  # [tiles] int64: first entry
    token_stop_ptr,  # [T] int64: last-plus-one entry of each token
    out_ptr,  # [B, n] float32
    b,
    n,
    t,
    d,
    g_stride_b,
    g_stride_t,
    table_stride,
    WIDEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BLOCK_B targets, BLOCK_J entries of one token). WIDEN: multiply in float32, for operands of two dtypes."""
    token = tl.load(tile_token_ptr + tl.program_id(1))
    if token >= t:
        return
    targets = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    entries = tl.load(tile_start_ptr + tl.program_id(1)) + tl.arange(0, BLOCK_J)
    in_batch = targets < b
    in_token = entries < tl.load(token_stop_ptr + token)
    reached = in_batch
    steps = d
    if targets_ptr is not None:
        reached = in_batch & (tl.load(targets_ptr + targets, mask=in_batch, other=-1) >= token)
        steps = tl.where(tl.max(reached.to(tl.int32), axis=0) > 0, d, 0)
    feature = tl.load(features_ptr + entries, mask=in_token, other=0)
    left = g_ptr + row_offset(targets, g_stride_b)[:, None] + row_offset(token, g_stride_t)
    right = table_ptr + row_offset(feature, table_stride)[None, :]
    total = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
    for column in range(0, steps, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside = columns < d
        g = tl.load(left + columns[None, :], mask=reached[:, None] & inside[None, :], other=0.0)
        w = tl.load(right + columns[:, None], mask=inside[:, None] & in_token[None, :], other=0.0)
        if WIDEN:
            g = g.to(tl.float32)
            w = w.to(tl.float32)
        total = dot(g, w, total, PRECISION)
    activation = tl.load(activations_ptr + entries, mask=in_token, other=0.0)
    total = tl.where(reached[:, None], total * activation[None, :], 0.0)
    address = out_ptr + row_offset(targets, n)[:, None] + entries[None, :]
    tl.store(address, total, mask=in_batch[:, None] & in_token[None, :])


def _tiles(positions: Tensor, t: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token, first entry) of each tile and the last-plus-one entry of each token, on the device, without a sync."""
    device = positions.device
    bounds = torch.searchsorted(positions, torch.arange(t + 1, dtype=positions.dtype, device=device))
    starts, stops = bounds[:-1], bounds[1:]
    last_tile = ((stops - starts + block - 1) // block).cumsum(0)
    tile = torch.arange(positions.shape[0] // block + t, device=device)
    token = torch.searchsorted(last_tile, tile, right=True)
    held = token.clamp(max=t - 1)
    first = last_tile[held] - (stops - starts + block - 1)[held] // block
    return token.int(), starts[held] + (tile - first) * block, stops


def launch_edges(
    G: Tensor,
    table: Tensor,
    features: Tensor,
    positions: Tensor,
    activations: Tensor,
    target_positions: Tensor | None = None,
    *,
    config: KernelConfig | None = None,
) -> Tensor:
    """Edges from n active features of one layer to B targets.

    Args:
        G: [B, T, D] with unit stride along D; float32, bfloat16 or float16.
        table: [F, D], rows contiguous.
        features, positions: [n] integers; positions ascending.
        activations: [n].
        target_positions: [B] integers, or None.
        config: launch parameters; the architecture's by default.

    Returns:
        [B, n] float32.
    """
    widen = G.dtype != table.dtype
    single = widen or G.dtype == torch.float32
    even = all(size % 16 == 0 for size in (G.shape[2], G.stride(0), G.stride(1), table.stride(0)))
    if config is None:
        arguments = (G, table, features, positions, activations, target_positions)
        config = configure(
            _TABLES.of(single, even),
            G.device,
            key=("edges", G.dtype, G.shape, target_positions is None),
            candidates=CANDIDATES if even and not single else [],
            run=lambda chosen: launch_edges(*arguments, config=chosen),
        )
    options = config.options()
    if single and dot_precision(torch.float32) == "tf32":
        options["PRECISION"] = "tf32"
    (b, t, d), n = G.shape, features.shape[0]
    out = torch.empty(b, n, device=G.device)
    if out.numel() == 0:
        return out
    token, start, stops = _tiles(positions.contiguous(), t, config["BLOCK_J"])
    with on_device(G):
        _edges[(cdiv(b, config["BLOCK_B"]), token.shape[0])](
            G,
            table,
            features.int().contiguous(),
            activations.float().contiguous(),
            None if target_positions is None else target_positions.contiguous(),
            token,
            start,
            stops,
            out,
            b,
            n,
            t,
            d,
            G.stride(0),
            G.stride(1),
            table.stride(0),
            WIDEN=widen,
            **options,
        )
    return out


def aot_cases(d: int) -> list[AotCase]:
    """Edges in each dtype, and float32 gradients against bfloat16 weights, with and without target positions."""
    cases = []
    for left, right in (*((dtype, dtype) for dtype in DTYPES), ("fp32", "bf16")):
        even = aligned(d, right) and aligned(d, left)
        pointers = {
            "g_ptr": left, "table_ptr": right, "features_ptr": "i32", "activations_ptr": "fp32", "out_ptr": "fp32",
            "tile_token_ptr": "i32", "tile_start_ptr": "i64", "token_stop_ptr": "i64",
        }  # fmt: skip
        for name, targets in (("", None), (" causal", "i64")):
            cases.append(
                case(
                    f"edges {left} x {right}{name}",
                    _edges,
                    _TABLES.of(left != right or left == "fp32", even),
                    {**pointers, "targets_ptr": targets},
                    odd=("b", "n", "t")
                    if even
                    else ("b", "n", "t", "d", "g_stride_b", "g_stride_t", "table_stride"),
                    constants={"WIDEN": left != right},
                    vector_loads=even,
                    matrix_unit=even,
                )
            )
    return cases
