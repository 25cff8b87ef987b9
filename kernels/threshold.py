"""From pre-activations in the scratch to CSR: every entry above its threshold, in order, and none forgotten.

    kept(n, f)  = z_nf - θ_f > -ε/2        (ε = 0 without a gradient window; strict, so ReLU is θ = 0)
    active      = z_nf > θ_f,   window = |z_nf - θ_f| < ε/2,   value = z_nf if active else 0

or, for BatchTopK, ``kept(n, f) = key(z_nf) >= κ`` with one key κ for all.

Both tests are monotone in z - θ, so a group of 16 columns holds a kept entry iff its maximum of z - θ passes the
test. Three passes over a chunk's rows: list the groups that pass (reads m), count their kept entries (reads those
groups of z), and, after a scan of the counts to ``row_ptr``, write them. Memory read: 1/16 of z plus two visits to the
few groups that matter.

Overflow: counts are always the true ones. The buffers may be smaller than the total (``capacity``, so that no count
has to reach the host before the write starts); then slots past the end are not written, and because z is still there,
the write alone is done again into buffers of the true size. Nothing is ever dropped. No atomics: the entry of rank r
in its row goes to slot ``row_ptr[n] + r``, bitwise the same from run to run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._aot import case
from fasttc.kernels._lang import GROUP, canonical, order_key, row_offset
from fasttc.kernels._launch import AotCase, KernelConfig, config, config_table, configure, on_device
from fasttc.kernels.encode import (
    SCRATCH_BYTES,
    Chunk,
    launch_pre_activations,
    matrix_operands,
    row_chunks,
)
from fasttc.kernels.select import padded

ACTIVE, WINDOW = 1, 2  # bits of an entry's flags

# One warp per row: rows are independent and short, and a warp needs no barrier.
_LIST = config_table(config(1, 1, BLOCK=1024))
_VISIT = config_table(config(1, 1, BLOCK_G=32))


@triton.jit
def _list_groups(
    maxima, stride_m,  # [R, >= n_groups] float32
    theta,  # [1] float32, subtracted here where m holds no θ; or None
    floor,  # [1] int32 key κ, or None
    half,  # float32 ε/2
    groups, stride_g,  # [R, n_groups] int32: the groups that pass, ascending
    n_listed,  # [R] int32
    n_groups,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The groups of a row with a kept entry."""
    row = tl.program_id(0)
    found = 0
    for start in range(0, n_groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        inside = group < n_groups
        best = tl.load(maxima + row_offset(row, stride_m) + group, mask=inside, other=0.0)
        if floor is not None:
            passes = order_key(best) >= tl.load(floor)
        else:
            if theta is not None:
                best -= tl.load(theta)
            passes = best > -half
        passes = (passes & inside).to(tl.int32)
        rank = found + tl.cumsum(passes, axis=0) - passes
        tl.store(groups + row_offset(row, stride_g) + rank, group, mask=passes > 0)
        found += tl.sum(passes, axis=0)
    tl.store(n_listed + row, found)


@triton.jit
def _visit(
    z, stride_z, bias, theta, floor, half, groups, stride_g, row, start, stop, n_features,
    THETA_STEP: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """(columns, z, z - θ, kept) [16·BLOCK_G] of listed groups start..start + BLOCK_G, in column order."""
    slot = start + tl.arange(0, BLOCK_G * GROUP) // GROUP
    listed = slot < stop
    column = tl.load(groups + row_offset(row, stride_g) + slot, mask=listed, other=0) * GROUP
    column += tl.arange(0, BLOCK_G * GROUP) % GROUP
    listed &= column < n_features
    value = tl.load(z + row_offset(row, stride_z) + column, mask=listed, other=0.0)
    if bias is not None:
        value += tl.load(bias + column, mask=listed, other=0.0).to(tl.float32)
    value = canonical(value)
    if floor is not None:
        above = value
        kept = listed & (order_key(value) >= tl.load(floor))
    else:
        above = value - tl.load(theta + column * THETA_STEP, mask=listed, other=0.0)
        kept = listed & (above > -half)
    return column, value, above, kept


@triton.jit
def _count_rows(
    z, stride_z,  # [R, >= F] float32
    bias,  # [F] or None
    theta,  # [F] or [1] float32, or None
    floor,  # [1] int32 key κ, or None
    half,  # float32 ε/2
    groups, stride_g, n_listed,  # of _list_groups
    totals,  # [R] int64
    n_features,
    THETA_STEP: tl.constexpr,  # 1 where θ has F entries, 0 where it has one
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Kept entries of each row."""
    row = tl.program_id(0)
    stop = tl.load(n_listed + row)
    total = 0
    for start in range(0, stop, BLOCK_G):
        _, _, _, kept = _visit(
            z, stride_z, bias, theta, floor, half, groups, stride_g, row, start, stop, n_features,
            THETA_STEP, BLOCK_G,
        )  # fmt: skip
        total += tl.sum(kept.to(tl.int32), axis=0)
    tl.store(totals + row, total)


@triton.jit
def _fill_rows(
    z, stride_z,  # [R, >= F] float32
    bias,  # [F] or None
    theta,  # [F] or [1] float32, or None
    floor,  # [1] int32 key κ, or None
    half,  # float32 ε/2
    groups, stride_g, n_listed,  # of _list_groups
    row_ptr,  # [R + 1] int64
    values,  # [capacity] float32
    indices,  # [capacity] int32
    flags,  # [capacity] int8, or None
    capacity, n_features,
    THETA_STEP: tl.constexpr,  # 1 where θ has F entries, 0 where it has one
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Writes the kept entries of each row at their rank, as far as the buffers reach."""
    row = tl.program_id(0)
    stop = tl.load(n_listed + row)
    base = tl.load(row_ptr + row)
    for start in range(0, stop, BLOCK_G):
        column, value, above, kept = _visit(
            z, stride_z, bias, theta, floor, half, groups, stride_g, row, start, stop, n_features,
            THETA_STEP, BLOCK_G,
        )  # fmt: skip
        one = kept.to(tl.int32)
        slot = base + tl.cumsum(one, axis=0) - one
        fits = kept & (slot < capacity)
        active = (above > 0) | (floor is not None)
        tl.store(values + slot, tl.where(active, value, 0.0), mask=fits)
        tl.store(indices + slot, column, mask=fits)
        if flags is not None:
            window = tl.abs(above) < half
            tl.store(flags + slot, (active.to(tl.int32) + 2 * window.to(tl.int32)).to(tl.int8), mask=fits)
        base += tl.sum(one, axis=0)


@dataclass(frozen=True)
class Rows:
    """CSR entries: values [n] float32, indices [n] int32, row_ptr [R + 1] int64, flags [n] int8 or None."""

    values: Tensor
    indices: Tensor
    row_ptr: Tensor
    flags: Tensor | None = None


def launch_compact(
    chunk: Chunk,
    *,
    theta: Tensor | None = None,
    half: float = 0.0,
    floor: Tensor | None = None,
    flags: bool = False,
    capacity: int | None = None,
) -> Rows:
    """The kept entries of a chunk, by the rule of θ (``theta`` [F] or [1] float32, ``half`` = ε/2) or of κ (``floor``).

    Args:
        chunk: where θ has F entries, its maxima are those of z - θ; else of z.
        flags: whether to return ACTIVE and WINDOW bits.
        capacity: size of the buffers of the first attempt; by default a guess. The result does not depend on it.

    One synchronisation, to trim the buffers to the entries (and to find out that they were too small).
    """
    (rows, n_features), n_groups = chunk.z.shape, chunk.maxima.shape[1]
    device = chunk.z.device
    if rows == 0:
        return _buffers(0, torch.zeros(1, dtype=torch.int64, device=device), flags)
    groups = torch.empty(rows, padded(n_groups), dtype=torch.int32, device=device)
    n_listed = torch.empty(rows, dtype=torch.int32, device=device)
    totals = torch.empty(rows, dtype=torch.int64, device=device)
    step = 0 if theta is None or theta.numel() == 1 else 1
    listing = configure(_LIST, device)
    visit = {"THETA_STEP": step, **configure(_VISIT, device).options()}
    read = (
        chunk.z, chunk.z.stride(0), chunk.bias, theta, floor, half, groups, groups.stride(0), n_listed,
    )  # fmt: skip
    with on_device(chunk.z):
        _list_groups[(rows,)](
            chunk.maxima, chunk.maxima.stride(0), theta if step == 0 else None, floor, half,
            groups, groups.stride(0), n_listed, n_groups, **listing.options(),
        )  # fmt: skip
        _count_rows[(rows,)](*read, totals, n_features, **visit)
    row_ptr = torch.cat([totals.new_zeros(1), totals.cumsum(0)])
    if capacity is None:
        capacity = rows * max(64, n_features // 256)
    attempt = _fill(read, row_ptr, capacity, n_features, flags, visit)
    total = int(row_ptr[-1])
    if total > capacity:
        return _fill(read, row_ptr, total, n_features, flags, visit)
    return _trimmed(attempt, total)


def _buffers(size: int, row_ptr: Tensor, flags: bool) -> Rows:
    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=row_ptr.device)

    return Rows(empty(torch.float32), empty(torch.int32), row_ptr, empty(torch.int8) if flags else None)


def _fill(
    read: tuple, row_ptr: Tensor, capacity: int, n_features: int, flags: bool, visit: KernelConfig
) -> Rows:
    out = _buffers(capacity, row_ptr, flags)
    with on_device(row_ptr):
        _fill_rows[(row_ptr.shape[0] - 1,)](
            *read, row_ptr, out.values, out.indices, out.flags, capacity, n_features, **visit
        )
    return out


def _trimmed(rows: Rows, total: int) -> Rows:
    """The first ``total`` entries, copied where that frees more than half of the buffers."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:total].clone() if 2 * total < tensor.shape[0] else tensor[:total]

    return Rows(
        cut(rows.values), cut(rows.indices), rows.row_ptr, None if rows.flags is None else cut(rows.flags)
    )


def joined(parts: list[Rows]) -> Rows:
    """The rows of several chunks, one after the other."""
    if len(parts) == 1:
        return parts[0]
    starts = torch.stack([part.row_ptr[-1] for part in parts]).cumsum(0)
    shifted = [part.row_ptr[1:] + start for part, start in zip(parts[1:], starts[:-1], strict=True)]
    return Rows(
        torch.cat([part.values for part in parts]),
        torch.cat([part.indices for part in parts]),
        torch.cat([parts[0].row_ptr, *shifted]),
        None
        if parts[0].flags is None
        else torch.cat([part.flags for part in parts if part.flags is not None]),
    )


def launch_encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    theta: Tensor,
    *,
    bandwidth: float | None = None,
    gemm: str = "tile",
    config: KernelConfig | None = None,
    capacity: int | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Rows:
    """JumpReLU (ReLU: ``theta`` 0) as CSR, indices ascending in a row.

    Args:
        x: [N, D], W_enc: [F, D], b_enc: [F]; float16, bfloat16 or float32.
        theta: [F] or [].
        bandwidth: ε; entries of the window below the threshold are then kept with value 0, and flags are returned.
        gemm, config, scratch_bytes: see :func:`fasttc.kernels.encode.launch_encode_topk`.
        capacity: see :func:`launch_compact`; per chunk.
    """
    x, W_enc = matrix_operands(x, W_enc)
    n, n_features = x.shape[0], W_enc.shape[0]
    theta = theta.detach().float().reshape(-1).contiguous()
    half = 0.0 if bandwidth is None else bandwidth / 2
    scratch, parts = None, []
    for rows in row_chunks(n, n_features, scratch_bytes) or [slice(0, 0)]:
        if scratch is None:
            shape = (rows.stop - rows.start, padded(n_features))
            scratch = torch.empty(shape, dtype=torch.float32, device=x.device)
        shift = theta if theta.numel() > 1 else None
        chunk = launch_pre_activations(
            x[rows], W_enc, b_enc, shift=shift, gemm=gemm, config=config, scratch=scratch
        )
        parts.append(
            launch_compact(chunk, theta=theta, half=half, flags=bandwidth is not None, capacity=capacity)
        )
    return joined(parts)


def aot_cases(d: int) -> list[AotCase]:
    """The three passes, with θ per feature and window, and with a floor; none depends on d."""
    cases = []
    for name in ("theta", "floor"):
        theta, floor = ("fp32", None) if name == "theta" else (None, "i32")
        listed = {"groups": "i32", "n_listed": "i32", "floor": floor}
        read = {"z": "fp32", "bias": None, "theta": theta, **listed}
        written = {
            "row_ptr": "i64",
            "values": "fp32",
            "indices": "i32",
            "flags": "i8" if floor is None else None,
        }
        constants = {"THETA_STEP": int(floor is None)}
        cases += [
            case(f"list_groups {name}", _list_groups, _LIST, {"maxima": "fp32", "theta": None, **listed},
                 floats=("half",), vector_loads=True),
            case(f"count_rows {name}", _count_rows, _VISIT, {**read, "totals": "i64"},
                 floats=("half",), constants=constants),
            case(f"fill_rows {name}", _fill_rows, _VISIT, {**read, **written},
                 floats=("half",), odd=("capacity",), constants=constants),
        ]  # fmt: skip
    return cases
