"""Rows of the graph: dense blocks as the sweep leaves them, and the compressed rows they become."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fasttc.attribution.plan import Point
from fasttc.attribution.positions import Positions
from fasttc.attribution.sources import Sources
from fasttc.attribution.team import Team

_CHUNK, _CHUNK_ON_GPU = 1 << 20, 1 << 26  # edges looked at together when zeros are removed


@dataclass(frozen=True)
class Segment:
    """A run of a block's columns.

    Attributes:
        start, stop: columns of the block.
        node: graph column of the first one.
        kind: "feature", "error" or "token".
        layer: of features and errors; -1 for tokens.
    """

    start: int
    stop: int
    node: int
    kind: str
    layer: int


def segments(sources: Sources, point: Point, positions: range) -> Iterator[Segment]:
    """Columns that targets at a point and in a range of positions can have, in graph order."""
    columns = 0
    length = positions.stop
    for number in range(point.depth):
        layer = sources.layers[number]
        first = layer.before[_lowest(point, number, positions)]
        stop = columns + layer.before[length] - first
        yield Segment(columns, stop, sources.feature_ptr[number] + first, "feature", number)
        columns = stop
    for number in range(point.depth):
        first = max(_lowest(point, number, positions), sources.layers[number].zeroed)
        stop = columns + max(0, length - first)
        yield Segment(columns, stop, sources.n_features + number * sources.n_tokens + first, "error", number)
        columns = stop
    first = positions.start if point == Point(0, False) else 0
    yield Segment(
        columns,
        columns + length - first,
        sources.n_features + sources.n_layers * sources.n_tokens + first,
        "token",
        -1,
    )


def _lowest(point: Point, layer: int, positions: range) -> int:
    """First position of a layer that is seen: nothing has moved between positions before the first attention."""
    return positions.start if layer == point.depth - 1 and not point.attention_first else 0


@dataclass(frozen=True)
class RowBlock:
    """Edges into one cohort of targets.

    Attributes:
        point: where the targets sit.
        rows: ``[n]`` int64 row numbers: of features as columns are numbered, targets after all of them.
        positions: of the n targets; the block's columns reach to the last one.
        values: ``[n, width]`` as laid out by :func:`segments` for all these positions; zero where a target does not
            reach.
    """

    point: Point
    rows: Tensor
    positions: Positions
    values: Tensor


@dataclass(frozen=True)
class Kept:
    """The feature nodes of the graph, as a choice among all active features.

    Attributes:
        nodes: their columns, ascending; None for all.
        total: number of active features.
    """

    nodes: list[int] | None
    total: int

    @property
    def count(self) -> int:
        return self.total if self.nodes is None else len(self.nodes)

    def columns(self, segment: Segment) -> tuple[int, int]:
        """First and last graph column (exclusive) of the kept nodes of a segment: they are contiguous."""
        first, last = segment.node, segment.node + segment.stop - segment.start
        if self.nodes is None:
            return first, last
        if segment.kind == "feature":
            return bisect_left(self.nodes, first), bisect_left(self.nodes, last)
        return first - self.total + self.count, last - self.total + self.count


@dataclass(frozen=True)
class Rows:
    """Compressed rows, on the CPU.

    Attributes:
        numbers: ``[n]`` int64, ascending.
        counts: ``[n]`` int64: edges of each row.
        columns, values: ``[edges]``, row after row.
        remainder: ``[n]`` float64: absolute sum of what is not stored.
    """

    numbers: Tensor
    counts: Tensor
    columns: Tensor
    values: Tensor
    remainder: Tensor


def merge_rows(team: Team, own: Rows, total: int) -> Rows:
    """Rows 0 to ``total`` - 1 from those of all processes; every process gets all of them."""
    if team.size == 1:
        return own
    numbers, counts, remainders = (team.gather(part) for part in (own.numbers, own.counts, own.remainder))
    lengths, remainder = torch.zeros(total, dtype=torch.int64), torch.zeros(total, dtype=torch.float64)
    for rows, count, left in zip(numbers, counts, remainders, strict=True):
        lengths[rows], remainder[rows] = count, left
    starts = (lengths.cumsum(0) - lengths).tolist()
    n_edges = int(lengths.sum())
    columns, values = own.columns.new_empty(n_edges), own.values.new_empty(n_edges)
    for whole, part in ((columns, own.columns), (values, own.values)):
        for rows, count, edges in zip(numbers, counts, team.gather(part), strict=True):
            _place(whole, starts, rows, count, edges)
    return Rows(torch.arange(total), lengths, columns, values, remainder)


def _place(whole: Tensor, starts: list[int], rows: Tensor, counts: Tensor, edges: Tensor) -> None:
    """Copies rows to where they start; those that follow each other are copied together."""
    breaks = (rows.diff() != 1).nonzero()[:, 0] + 1
    used = 0
    for run in rows.tensor_split(breaks) if len(rows) else ():
        length = int(counts[: len(run)].sum())
        counts = counts[len(run) :]
        place = starts[int(run[0])]
        whole[place : place + length] = edges[used : used + length]
        used += length


class EdgeWriter:
    """Collects compressed rows, on the device where the blocks are.

    Args:
        sources: of the prompt.
        kept: which features are nodes.
        share: of a row's absolute sum that its stored edges must reach; 1 stores all non-zero edges.
        capacity: edges to make room for; more is allocated when needed.
    """

    def __init__(self, sources: Sources, kept: Kept, share: float, capacity: int) -> None:
        self.sources, self.kept, self.share = sources, kept, share
        like = sources.embedding
        self._columns = torch.empty(capacity, dtype=torch.int32, device=like.device)
        self._values = torch.empty(capacity, dtype=like.dtype, device=like.device)
        self._used = 0
        self._rows: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._remainders: list[Tensor] = []
        self._kept_nodes = None if kept.nodes is None else torch.tensor(kept.nodes, device=like.device)

    def write(self, block: RowBlock) -> None:
        """Appends the rows of ``block``, each up to its own position. Rows may come in any order."""
        values, columns, parts = self._restrict(block)
        add = self._append if self.share == 1 else self._append_largest
        for position, rows in block.positions.runs():
            own = self._reached(parts, block.point, position)
            add([values[rows, part] for part in own], [columns[part] for part in own])
        self._rows.append(block.rows)

    def _restrict(self, block: RowBlock) -> tuple[Tensor, Tensor, list[Segment]]:
        """The block without features that are no nodes: values, graph columns, and where its segments are now."""
        wide = list(segments(self.sources, block.point, block.positions.span))
        parts, start = [], 0
        for part in wide:
            first, last = self.kept.columns(part)
            parts.append(replace(part, start=start, stop=start + last - first, node=first))
            start += last - first
        columns = torch.cat(
            [_range(part.node, part.node + part.stop - part.start, self._columns) for part in parts]
        )
        if self._kept_nodes is None:
            return block.values, columns, parts
        chosen = []
        for part, new in zip(wide, parts, strict=True):
            if part.kind == "feature":
                nodes = self._kept_nodes[new.node : new.node + new.stop - new.start]
                chosen.append(nodes - (part.node - part.start))
            else:
                chosen.append(_range(part.start, part.stop, self._kept_nodes))
        return block.values.index_select(1, torch.cat(chosen)), columns, parts

    def _reached(self, parts: list[Segment], point: Point, position: int) -> list[slice]:
        """Columns of a restricted block that a target at ``position`` can have."""
        slices = []
        for part, own in zip(
            parts, segments(self.sources, point, range(position, position + 1)), strict=True
        ):
            first, last = self.kept.columns(own)
            slices.append(slice(part.start + first - part.node, part.start + last - part.node))
        return slices

    def _append(self, values: list[Tensor], columns: list[Tensor]) -> None:
        n, width = len(values[0]), sum(part.shape[1] for part in values)
        place = self._reserve(n * width)
        torch.cat(values, 1, out=self._values[place].view(n, width))
        self._columns[place].view(n, width).copy_(torch.cat(columns))
        self._counts.append(torch.full((n,), width))

    def _append_largest(self, values: list[Tensor], columns: list[Tensor]) -> None:
        """Keeps, in each row, the smallest set of edges that reaches the share; ties go to lower columns."""
        row = torch.cat(values, 1)
        size = row.abs()
        ordered, order = size.sort(dim=1, descending=True, stable=True)
        reached = ordered.cumsum(1, dtype=torch.float64)
        needed = (reached < self.share * reached[:, -1:]).sum(1, keepdim=True) + 1
        chosen = (torch.arange(row.shape[1], device=row.device) < needed) & (ordered > 0)
        stored = torch.zeros_like(chosen).scatter_(1, order, chosen)
        counts = stored.sum(1)
        place = self._reserve(int(counts.sum()))
        self._values[place] = row[stored]
        self._columns[place] = torch.cat(columns).expand(len(row), -1)[stored]
        self._counts.append(counts.cpu())
        self._remainders.append(size.masked_fill_(stored, 0).sum(1, dtype=torch.float64))

    def _reserve(self, more: int) -> slice:
        place = slice(self._used, self._used + more)
        if place.stop > len(self._values):
            for name in ("_values", "_columns"):
                old: Tensor = getattr(self, name)
                new = old.new_empty(max(place.stop, len(old) + len(old) // 2))
                new[: self._used] = old[: self._used]
                setattr(self, name, new)
        self._used = place.stop
        return place

    def finish(self, row_numbers: Tensor) -> Rows:
        """The rows on the CPU, in row order, without edges that are zero.

        Args:
            row_numbers: maps the blocks' row numbers to 0, 1, ... in the order wanted; CPU.
        """
        none = torch.zeros(0, dtype=torch.int64)
        rows = row_numbers[torch.cat([none, *(rows.cpu() for rows in self._rows)])]
        counts = torch.cat([none, *self._counts])
        remainder = torch.zeros(len(rows), dtype=torch.float64)
        if self._remainders:
            remainder = torch.cat(self._remainders).cpu()
        columns, values = self._columns[: self._used], self._values[: self._used]
        counts, columns, values = _drop_zeros(counts, columns, values)
        if bool((rows.diff() < 0).any()):
            order = rows.argsort()
            counts, columns, values = _reorder(order, counts, columns, values)
            rows, remainder = rows[order], remainder[order]
        return Rows(rows, counts, columns.cpu(), values.cpu(), remainder)


def _drop_zeros(counts: Tensor, columns: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Removes edges whose value is zero, in place: the others move to the front."""
    ends = counts.cumsum(0).to(values.device)
    zeros, used = torch.zeros_like(ends), 0
    chunk = _CHUNK_ON_GPU if values.is_cuda else _CHUNK
    for start in range(0, len(values), chunk):
        part_values, part_columns = values[start : start + chunk], columns[start : start + chunk]
        empty = part_values == 0
        if bool(empty.any()):
            rows = torch.searchsorted(ends, start + empty.nonzero()[:, 0], right=True)
            zeros += torch.bincount(rows, minlength=len(counts))
            part_values, part_columns = part_values[~empty], part_columns[~empty]
        elif used == start:
            used += len(part_values)
            continue
        place = slice(used, used + len(part_values))
        values[place], columns[place] = part_values.clone(), part_columns.clone()  # the ranges may overlap
        used = place.stop
    return counts - zeros.to(counts.device), columns[:used], values[:used]


def _reorder(order: Tensor, counts: Tensor, columns: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``order[0]``, ``order[1]``, ... one after another."""
    starts = counts.cumsum(0) - counts
    counts = counts[order]
    shift = starts[order] - (counts.cumsum(0) - counts)
    edges = torch.arange(len(values)) + shift.repeat_interleave(counts)
    edges = edges.to(values.device)
    return counts, columns[edges], values[edges]


def _range(first: int, last: int, like: Tensor) -> Tensor:
    return torch.arange(first, last, dtype=like.dtype, device=like.device)
