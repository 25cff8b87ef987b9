"""Sums of weighted rows over runs of entries, cut at fixed places: what decode, segment and Adam share.

A *run* is the entries ``[start, stop)`` of one output row: a token's features in decode, a feature's tokens in
segment. Entries are added in ascending order, ROWS at a time counted from the run's start, so a sum depends on the
run alone: not on its neighbours, not on what the scheduler decides, not on zeros that pad it.

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
def weighted_rows(
    weights,  # [ROWS] float32
    index,  # [ROWS]
    valid,  # [ROWS]
    table_ptr,  # [rows, D]
    table_stride,
    columns,  # [BLOCK_D]
    d,
):
    """``sum_j weights_j table[index_j, columns]`` over the valid entries: [BLOCK_D] float32."""
    address = table_ptr + row_offset(index, table_stride)[:, None] + columns[None, :]
    rows = tl.load(address, mask=valid[:, None] & (columns < d)[None, :], other=0.0)
    return tl.sum(weights[:, None] * rows.to(tl.float32), axis=0)


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
    d,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds the weighted rows of entries [start, stop), ROWS at a time, to ``total``.

    With STAGES > 1 the rows of the next blocks are copied to shared memory while one is added.
    """
    for first in tl.range(start, stop, ROWS, num_stages=STAGES):
        entries = first + tl.arange(0, ROWS)
        valid = entries < stop
        weights = tl.load(values_ptr + entries, mask=valid, other=0.0).to(tl.float32)
        index = tl.load(indices_ptr + entries, mask=valid, other=0)
        total += weighted_rows(weights, index, valid, table_ptr, table_stride, columns, d)
    return total
