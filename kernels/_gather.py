"""Sums of weighted rows over runs of entries, cut at fixed places: what decode, segment and Adam share.

A *run* is the entries ``[start, stop)`` of one output row: a token's features in decode, a feature's tokens in
segment. Entries are added one by one in ascending order, so a sum depends on the run alone and on nothing that the
scheduler decides.

A run of more than CUT entries is cut every CUT entries, counted from its own start. Each full piece is summed by a
program of its own into a scratch row, and the run's program adds those rows in order, then its tail. The piece that
starts at entry p owns scratch row ``p // CUT``: full pieces start at least CUT entries apart, so no two share a row,
and ``entries // CUT`` rows are enough. No table and no count has to reach the host.
"""

import triton
import triton.language as tl

from fasttc.kernels._lang import row_offset


@triton.jit
def run_bounds(row, row_ptr_ptr, k):
    """First and last-plus-one entry of a row: k entries each, or int64 offsets where ``row_ptr_ptr`` is given."""
    if row_ptr_ptr is None:
        start = row_offset(row, k)
        stop = start + k
    else:
        start = tl.load(row_ptr_ptr + row)
        stop = tl.load(row_ptr_ptr + row + 1)
    return start, stop


@triton.jit
def full_pieces(start, stop, CUT: tl.constexpr):
    """How many scratch rows belong to a run: 0 unless it is longer than CUT."""
    return tl.where(stop - start > CUT, (stop - start) // CUT, 0)


@triton.jit
def piece_start(slot, start, stop, CUT: tl.constexpr):
    """The first entry of the full piece that owns scratch row ``slot``, or -1 if there is none.

    ``[start, stop)`` is the run that holds entry ``(slot + 1)·CUT - 1``, the one entry that every piece starting in
    ``[slot·CUT, (slot + 1)·CUT)`` has.
    """
    last = row_offset(slot + 1, CUT) - 1
    first = start + (last - start) // CUT * CUT
    owned = (stop - start > CUT) & (first + CUT <= stop)
    return tl.where(owned, first, -1)


@triton.jit
def row_of_entry(entry, row_ptr_ptr, n_rows, k):
    """The row that holds an entry: a division for padded rows, else a binary search of the offsets."""
    if row_ptr_ptr is None:
        low = entry // k
    else:
        low = tl.cast(0, tl.int64)
        high = tl.cast(n_rows, tl.int64)
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(row_ptr_ptr + middle) <= entry
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
    return low


@triton.jit
def add_weighted_rows(
    total,  # [BLOCK_D] float32
    values_ptr,  # [entries]
    indices_ptr,  # [entries]
    table_ptr,  # [rows, D]
    table_stride,
    start,
    stop,
    columns,
    inside,
    UNROLL: tl.constexpr,
):
    """``total + sum_j values_j table[indices_j, columns]`` in ascending j. Rows with value 0 are not read.

    UNROLL rows are in flight at once; they are added in order all the same.
    """
    for first in range(start, stop, UNROLL):
        for step in tl.static_range(UNROLL):
            entry = first + step
            valid = entry < stop
            value = tl.cast(tl.load(values_ptr + entry, mask=valid, other=0.0), tl.float32)
            index = tl.load(indices_ptr + entry, mask=valid, other=0)
            address = table_ptr + row_offset(index, table_stride) + columns
            weight = tl.broadcast_to(value, total.shape)  # compared as a block: the interpreter needs it
            row = tl.load(address, mask=inside & (weight != 0), other=0.0)
            total += weight * row.to(tl.float32)
    return total
