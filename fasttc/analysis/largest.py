"""The entries with the largest keys of many streams at once, in bounded memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Largest:
    """Keeps, for every slot, the ``n`` entries with the largest keys, with whatever belongs to them.

    With random keys it is a uniform sample of each slot's entries. Entries are collected and sorted in bulk once as
    many are waiting as can be kept. Of equal keys the one that came first stays.

    Args:
        slots: number of slots.
        n: entries kept for each.
        fields: names of what is added with every key.
    """

    def __init__(self, slots: int, n: int, fields: tuple[str, ...] = ()) -> None:
        self._slots, self._n, self._fields = slots, n, fields
        self._floor = np.full(slots, -np.inf)
        self._waiting: list[dict[str, Array]] = []
        self._count = 0

    def accepts(self, slots: Array, keys: Array) -> NDArray[np.bool_]:
        """Which entries can still be among the largest; the others need not be added."""
        return keys > self._floor[slots]

    def add(self, slots: Array, keys: Array, **fields: Array) -> None:
        """Adds entries: ``slots [m]`` int, ``keys [m]`` float, and one array ``[m, ...]`` per field."""
        if not len(slots):
            return
        self._waiting.append({"slot": slots, "key": keys, **{name: fields[name] for name in self._fields}})
        self._count += len(slots)
        if self._count > 2 * self._slots * self._n:
            self._compact()

    def entries(self) -> dict[str, Array]:
        """``slot``, ``key`` and the fields of all that is kept, by slot and falling key; empty if there is nothing."""
        self._compact()
        return self._waiting[0] if self._waiting else {}

    def _compact(self) -> None:
        if not self._waiting:
            return
        joined = {name: np.concatenate([part[name] for part in self._waiting]) for name in self._waiting[0]}
        order = np.lexsort((-joined["key"], joined["slot"]))
        slots = joined["slot"][order]
        rank = np.arange(len(slots)) - np.searchsorted(slots, slots)
        kept = order[rank < self._n]
        self._waiting = [{name: column[kept] for name, column in joined.items()}]
        self._count = len(kept)
        last = order[rank == self._n - 1]  # a slot that is full takes nothing below its last
        self._floor[joined["slot"][last]] = joined["key"][last]
