"""Positions of targets, known to the host and to the device, so that neither waits for the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Positions(Sequence[int]):
    """Positions in ascending order.

    Attributes:
        numbers: on the host.
        tensor: ``[n]`` int64, the same on the device.
    """

    numbers: list[int]
    tensor: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "Positions":
        """From a tensor (waits for its device once)."""
        return cls(tensor.tolist(), tensor)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> "Positions": ...
    def __getitem__(self, index: int | slice) -> "int | Positions":
        if isinstance(index, int):
            return self.numbers[index]
        return Positions(self.numbers[index], self.tensor[index])

    @property
    def length(self) -> int:
        """P: positions 0 to the last one."""
        return self.numbers[-1] + 1

    @property
    def span(self) -> range:
        """From the first to the last."""
        return range(self.numbers[0], self.length)

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Each distinct position, and where it stands."""
        start = 0
        while start < len(self.numbers):
            position, stop = self.numbers[start], start + 1
            while stop < len(self.numbers) and self.numbers[stop] == position:
                stop += 1
            yield position, slice(start, stop)
            start = stop
