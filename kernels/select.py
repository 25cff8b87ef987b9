"""Exact selection of the k largest by (value, lower index), by groups of 16 columns.

For each row of ``z [R, n]`` and its group maxima ``m_g = max_{16g <= c < 16(g+1)} z_c``:

    groups  = the k groups first in the order (m_g descending, g ascending)
    columns = the k columns of those groups first in the order (z_c descending, c ascending)

*Exact, ties included.* Let τ be the k-th chosen group's maximum. The chosen maxima are k distinct elements, each ≥ τ.
An element e of a group that was not chosen has e ≤ m_g ≤ τ; if e = τ, every chosen group with maximum τ has a lower
number, hence holds an equal element at a lower column. So k elements come before e and e is not selected. The same
argument holds one level up, for groups of groups, so only O(16·k) keys per level are ever compared.

Within a level the k-th largest key is found by bisection on the integer keys of :func:`fasttc.kernels._lang.order_key`
(each step counts the keys at or above the middle; it stops as soon as exactly k are). Columns leave in ascending
order. No atomics on floats, no data race: bitwise the same from run to run, and each row on its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._aot import case
from fasttc.kernels._lang import (
    GROUP,
    INTERPRETING,
    LOWEST_KEY,
    canonical,
    key_value,
    order_key,
    row_offset,
)
from fasttc.kernels._launch import (
    AotCase,
    KernelConfig,
    cdiv,
    config,
    config_table,
    configure,
    interpreting,
    next_power_of_two,
    on_device,
)

IN_REGISTERS = (
    8192  # candidates of a row that one program keeps in registers; more are read again at each step
)
FLAT = 1024  # a level this small is not worth a level above it

_GROUPS = config_table(config(4, 2, BLOCK=4096))
_LONG = config_table(config(8, 1, BLOCK_R=1, BLOCK=4096))
_WIDTHS = (512, 1024, 2048, 4096, IN_REGISTERS)  # block widths that the ahead-of-time suite compiles


def _rows_config(width: int) -> KernelConfig:
    """Warps for a block of ``width`` keys: one warp up to 1024, so that counting needs no barrier between warps."""
    rows = 16 if interpreting() else 1  # the interpreter pays per program, whatever its size
    return config(min(8, max(1, width // 1024)), 1, BLOCK_R=rows, BLOCK=width)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def group_maximum(z, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Maxima [ROWS, GROUPS] of contiguous groups of 16 columns; NaN wins (the interpreter: as +inf)."""
    grouped = tl.reshape(z, [ROWS, GROUPS, GROUP])
    if INTERPRETING:
        return tl.max(tl.where(grouped != grouped, float("inf"), grouped), axis=2)
    return tl.reduce(grouped, 2, _larger)


@triton.jit
def _group_max(
    z, stride_z,  # [R, n]
    bias,  # [F] or None
    shift,  # [F] or None
    maxima, stride_m,  # [R, ceil(n / 16)]
    n, n_features,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``m_g = max over the group of z + bias - shift``."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    value = tl.load(z + row_offset(row, stride_z) + columns, mask=inside, other=float("-inf"))
    known = columns < n_features
    if bias is not None:
        value += tl.load(bias + columns, mask=known, other=0.0).to(tl.float32)
    if shift is not None:
        value = canonical(value) - tl.load(shift + columns, mask=known, other=0.0).to(tl.float32)
    best = group_maximum(value[None, :], 1, BLOCK // GROUP)
    groups = tl.program_id(0) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    target = maxima + row_offset(row, stride_m) + groups
    tl.store(target[None, :], best, mask=(groups * GROUP < n)[None, :])


@triton.jit
def _candidates(
    source, stride, parents, columns, bias, rows, slots, n_rows, n, n_candidates, n_parents,
):  # fmt: skip
    """Columns and order keys [BLOCK_R, BLOCK] of candidate slots; slots past the end have the lowest key.

    With parents, slot s is column ``16·parents[s // 16] + s % 16``; else it is column s.
    """
    valid = (rows < n_rows)[:, None] & (slots < n_candidates)[None, :]
    if parents is not None:
        at = row_offset(rows, n_parents)[:, None] + (slots // GROUP)[None, :]
        column = tl.load(parents + at, mask=valid, other=0) * GROUP + (slots % GROUP)[None, :]
        valid &= column < n
    else:
        column = tl.broadcast_to(slots[None, :], [rows.shape[0], slots.shape[0]])
    value = tl.load(source + row_offset(rows, stride)[:, None] + column, mask=valid, other=0.0)
    if bias is not None:
        value += tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)
    if columns is not None:
        column = tl.load(columns + row_offset(rows, stride)[:, None] + column, mask=valid, other=0)
    return column, tl.where(valid, order_key(value), LOWEST_KEY)


@triton.jit
def _narrow(low, high, middle, count, k):
    """One bisection step: keeps ``count(keys >= low) >= k > count(keys > high)``, or ends where count is k."""
    low = tl.where(count >= k, middle, low)
    below = tl.maximum(middle, LOWEST_KEY + 1) - 1  # rows without candidates sit at the lowest key
    high = tl.where(count >= k, high, below)
    return low, tl.where(count == k, middle, high)


@triton.jit
def _emit(
    column, key, low, above_before, equal_before, needed, rows, n_rows, k, indices, values,
    RELU: tl.constexpr,
):  # fmt: skip
    """Stores the selected entries of a block at their rank, and returns the counts up to the block's end.

    Selected: keys above ``low``, and the first ``needed`` keys equal to it. Both counts ride in one 32-bit scan.
    """
    above = key > low[:, None]
    equal = key == low[:, None]
    both = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = tl.cumsum(both, axis=1) - both
    n_above = (before & 0xFFFF) + above_before[:, None]
    n_equal = (before >> 16) + equal_before[:, None]
    chosen = above | (equal & (n_equal < needed[:, None]))
    chosen &= (rows < n_rows)[:, None]
    at = row_offset(rows, k)[:, None] + n_above + tl.minimum(n_equal, needed[:, None])
    tl.store(indices + at, column, mask=chosen)
    if values is not None:
        value = key_value(key)
        value = tl.where(value < 0, 0.0, value) if RELU else value
        tl.store(values + at, value, mask=chosen)
    total = tl.sum(both, axis=1)
    return above_before + (total & 0xFFFF), equal_before + (total >> 16)


@triton.jit
def _select_rows(
    source, stride,  # [R, n] float32
    parents,  # [R, n_parents] int32 ascending, or None
    columns,  # [R, n] int32 ascending column of each entry of source, or None
    bias,  # [F] or None
    floor_in,  # [R] int32, a key that at least k candidates reach, or None
    floor_out,  # [R] int32
    indices,  # [R, k] int32
    values,  # [R, k] float32, or None
    n_rows, n, n_candidates, n_parents, k,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The k first candidates of each row, all of them in registers."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slots = tl.arange(0, BLOCK)
    column, key = _candidates(
        source, stride, parents, columns, bias, rows, slots, n_rows, n, n_candidates, n_parents
    )
    high = tl.max(key, axis=1)
    if floor_in is not None:
        low = tl.load(floor_in + rows, mask=rows < n_rows, other=LOWEST_KEY)
    else:
        low = tl.min(tl.where(key == LOWEST_KEY, high[:, None], key), axis=1)
    low = tl.minimum(low, high)
    while tl.max((low < high).to(tl.int32), axis=0) > 0:
        middle = (low | high) - ((low ^ high) >> 1)  # the upper mean, without overflow
        count = tl.sum((key >= middle[:, None]).to(tl.int32), axis=1)
        low, high = _narrow(low, high, middle, count, k)
    needed = k - tl.sum((key > low[:, None]).to(tl.int32), axis=1)
    zero = tl.zeros([BLOCK_R], tl.int32)
    _emit(column, key, low, zero, zero, needed, rows, n_rows, k, indices, values, RELU)
    tl.store(floor_out + rows, low, mask=rows < n_rows)


@triton.jit
def _select_long_rows(
    source, stride,  # [R, n] float32
    parents,  # [R, n_parents] int32 ascending, or None
    columns,  # [R, n] int32 ascending column of each entry of source, or None
    bias,  # [F] or None
    floor_in,  # [R] int32, a key that at least k candidates reach, or None
    floor_out,  # [R] int32
    indices,  # [R, k] int32
    values,  # [R, k] float32, or None
    n_rows, n, n_candidates, n_parents, k,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As :func:`_select_rows` for more candidates than registers hold: each bisection step reads them again."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    low = tl.full([BLOCK_R], LOWEST_KEY + 1, tl.int32)
    if floor_in is not None:
        low = tl.load(floor_in + rows, mask=rows < n_rows, other=0x7FFFFFFF)
    high = tl.full([BLOCK_R], 0x7FFFFFFF, tl.int32)
    while tl.max((low < high).to(tl.int32), axis=0) > 0:
        middle = (low | high) - ((low ^ high) >> 1)
        count = tl.zeros([BLOCK_R], tl.int32)
        for start in range(0, n_candidates, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            _, key = _candidates(
                source, stride, parents, columns, bias, rows, slots, n_rows, n, n_candidates, n_parents
            )
            count += tl.sum((key >= middle[:, None]).to(tl.int32), axis=1)
        low, high = _narrow(low, high, middle, count, k)
    needed = tl.zeros([BLOCK_R], tl.int32) + k
    for start in range(0, n_candidates, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        _, key = _candidates(
            source, stride, parents, columns, bias, rows, slots, n_rows, n, n_candidates, n_parents
        )
        needed -= tl.sum((key > low[:, None]).to(tl.int32), axis=1)
    above = tl.zeros([BLOCK_R], tl.int32)
    equal = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, n_candidates, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        column, key = _candidates(
            source, stride, parents, columns, bias, rows, slots, n_rows, n, n_candidates, n_parents
        )
        above, equal = _emit(column, key, low, above, equal, needed, rows, n_rows, k, indices, values, RELU)
    tl.store(floor_out + rows, low, mask=rows < n_rows)


def level_sizes(n_features: int, k: int) -> list[int]:
    """Row lengths of the levels of a selection: columns, groups, groups of groups, …, as far as they pay."""
    sizes = [n_features]
    while sizes[-1] > FLAT and cdiv(sizes[-1], 16) > k:
        sizes.append(cdiv(sizes[-1], 16))
    return sizes


def padded(n: int) -> int:
    """Row stride of a level of n entries: rows start at 64 bytes, so that loads of four never straddle."""
    return cdiv(n, 16) * 16


def launch_group_max(
    z: Tensor,
    n: int,
    *,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    n_features: int | None = None,
) -> Tensor:
    """Maxima [R, ceil(n/16)] (row stride padded to 16) of groups of 16 among the first n columns of z [R, ...].

    Args:
        z: [R, >= n] float32, unit column stride.
        bias, shift: [n_features] or None; the maxima are those of ``z + bias - shift``.
    """
    rows, groups = z.shape[0], cdiv(n, 16)
    maxima = torch.empty(rows, padded(groups), dtype=torch.float32, device=z.device)
    chosen = configure(_GROUPS, z.device)
    grid_of_columns = cdiv(n, chosen["BLOCK"])
    with on_device(z):
        for first in range(0, rows, 65535):  # the second grid axis ends there
            part = slice(first, min(first + 65535, rows))
            _group_max[(grid_of_columns, part.stop - part.start)](
                z[part], z.stride(0), bias, shift, maxima[part], maxima.stride(0), n, n_features or n,
                **chosen.options(),
            )  # fmt: skip
    return maxima[:, :groups]


def launch_select(
    levels: list[Tensor],
    k: int,
    *,
    relu: bool = False,
    bias: Tensor | None = None,
    columns: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k first columns of each row by (value, lower column), from the levels of a hierarchy.

    Args:
        levels: ``[z [R, F], maxima [R, ceil(F/16)], ...]`` float32 with unit column stride, each the group maxima
            (of ``z + bias``) of the one before.
        k: 1 ≤ k ≤ F.
        relu: whether negative values leave as 0.
        bias: [F], added to z; or None.
        columns: [R, F] int32, ascending in a row, columns that stand for those of z (one level only); or None.
        out: contiguous values [R, k] float32 and indices [R, k] int32 to be written instead of fresh ones.

    Returns:
        values [R, k] float32, indices [R, k] int32 ascending, floor [R] int32: a key that exactly the selected
        entries reach, or, among ties, the key of the tie.
    """
    rows, device = levels[0].shape[0], levels[0].device
    parents: Tensor | None = None
    floor: Tensor | None = None
    if out is None:
        out = (
            torch.empty(rows, k, dtype=torch.float32, device=device),
            torch.empty(rows, k, dtype=torch.int32, device=device),
        )
    values, indices = out
    for depth in range(len(levels) - 1, -1, -1):
        level = levels[depth]
        if depth > 0 and level.shape[1] <= k:
            continue
        chosen = indices if depth == 0 else torch.empty(rows, k, dtype=torch.int32, device=device)
        reached = torch.empty(rows, dtype=torch.int32, device=device)
        _launch_level(
            level, parents, floor, reached, chosen, k,
            values=values if depth == 0 else None, relu=relu, bias=bias if depth == 0 else None,
            columns=columns if depth == 0 else None,
        )  # fmt: skip
        parents, floor = chosen, reached
    assert parents is not None, "the last level always selects"
    assert floor is not None, "the last level always selects"
    return values, parents, floor


def _launch_level(level, parents, floor, reached, chosen, k, *, values, relu, bias, columns) -> None:
    rows, n = level.shape
    n_candidates = n if parents is None else 16 * k
    width = next_power_of_two(n_candidates)
    kernel = _select_rows if width <= IN_REGISTERS else _select_long_rows
    options = _rows_config(width) if kernel is _select_rows else configure(_LONG, level.device)
    if rows == 0:
        return
    with on_device(level):
        kernel[(cdiv(rows, options["BLOCK_R"]),)](
            level, level.stride(0), parents, columns, bias, floor, reached, chosen, values,
            rows, n, n_candidates, k, k, RELU=relu, **options.options(),
        )  # fmt: skip


def select_topk(
    z: Tensor, k: int, *, relu: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """values [R, k] float32 and indices [R, k] int32 (ascending) of the k largest of each row of z [R, F] float32.

    Reads z once for the group maxima, then 16·k entries of it per row. Exact, ties by lower index; deterministic.
    """
    levels = [z]
    for size in level_sizes(z.shape[1], k)[:-1]:
        first = len(levels) == 1
        levels.append(launch_group_max(levels[-1], size, bias=bias if first else None))
    values, indices, _ = launch_select(levels, k, relu=relu, bias=bias)
    return values, indices


def aot_cases(d: int) -> list[AotCase]:
    """Group maxima and the selections; none depends on d."""
    level = {"source": "fp32", "columns": None, "bias": None, "floor_out": "i32", "indices": "i32"}
    inner = {**level, "parents": "i32", "floor_in": "i32", "values": "fp32"}
    outer = {**level, "parents": None, "floor_in": None, "values": None}
    cases = [
        case("group_max", _group_max, _GROUPS, {"z": "fp32", "bias": None, "shift": None, "maxima": "fp32"},
             vector_loads=True),
        case("group_max bias", _group_max, _GROUPS, {"z": "fp32", "bias": "bf16", "shift": None, "maxima": "fp32"},
             vector_loads=True),
        case("select_long_rows", _select_long_rows, _LONG, inner,
             constants={"RELU": True}),
    ]  # fmt: skip
    for width in _WIDTHS:
        table = config_table(_rows_config(width))
        cases.append(
            case(f"select_rows first {width}", _select_rows, table, outer, constants={"RELU": False})
        )
        cases.append(case(f"select_rows last {width}", _select_rows, table, inner, constants={"RELU": True}))
    return cases
