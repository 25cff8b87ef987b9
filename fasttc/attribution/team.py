"""Processes that share the targets of a graph: who computes what, how it comes together, and what happens on failure.

Every process of a ``torch.distributed`` group holds the model and makes the same plan; each then traces its own part
of the cohorts. Blocks of rows are therefore the same numbers as in a single process, and so is the graph. What is
exchanged (rows, influence) is on the way to the CPU anyway and goes over a gloo group of its own, whatever the back
end of the group it was called in.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

PATIENCE = 45.0  # seconds that a process waits for the slowest one; a lost process is noticed within a minute
_INTERVAL = 10.0  # seconds between two signs of life of processes that are still at work
_MESSAGE_BYTES = 400
_WORKING, _DONE, _FAILED = range(3)  # what processes tell each other when they meet


class Team:
    """One process alone: all work is its own, nothing is exchanged.

    Attributes:
        rank: number of this process.
        size: how many there are.
    """

    rank, size = 0, 1

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Which process does each piece of work, so that all are busy for about the same time.

        The most expensive piece goes first, each to the process with the least to do, ties to the lowest number.
        """
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
            owners[number] = min(range(self.size), key=lambda rank: loads[rank])
            loads[owners[number]] += costs[number]
        return owners

    def working(self) -> None:
        """A sign of life, between two pieces of work. Raises ConnectionError where another process failed."""

    def finished(self) -> None:
        """Waits until all processes have done their work; raises as :meth:`working`."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in their order: the same bits everywhere and every time."""
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, on the CPU; lengths may differ, dtypes and other sizes not."""
        return [tensor.cpu()]

    def smallest(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        return number

    def check_same(self, **values: Any) -> None:
        """ValueError where processes were called with different arguments, naming the first one that differs."""


class Group(Team):
    """The processes of a ``torch.distributed`` group.

    A process that fails says so at the next meeting. So that nobody is elsewhere then, all processes meet before each
    exchange of data: messages of one size, whatever each has to say.

    Args:
        patience: seconds to wait for the slowest process.
    """

    def __init__(self, patience: float) -> None:
        self.rank, self.size, self.patience = dist.get_rank(), dist.get_world_size(), patience
        self._last, self._over = time.monotonic(), False
        with self._plain_errors():
            self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))

    def close(self) -> None:
        """Gives the connections back."""
        dist.destroy_process_group(self._group)

    def working(self) -> None:
        if time.monotonic() - self._last > min(_INTERVAL, self.patience / 4):
            self._meet(_WORKING)

    def finished(self) -> None:
        while not self._meet(_DONE):
            pass

    def failed(self, error: BaseException) -> None:
        """Tells the others, who are at work or waiting, why this process gives up."""
        if not self._over:  # otherwise the others are gone, or know already
            with suppress(ConnectionError):  # this process's own error is the one to raise
                self._meet(_FAILED, f"{type(error).__name__}: {error}")

    def sum(self, tensor: Tensor) -> Tensor:
        self.finished()
        parts = self._all_gather(tensor.cpu().contiguous())
        return torch.stack(parts).sum(0).to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.finished()
        own = tensor.cpu().contiguous()
        lengths = [int(part) for part in self._all_gather(torch.tensor([len(own)]))]
        parts = [
            own if rank == self.rank else own.new_empty(length, *own.shape[1:])
            for rank, length in enumerate(lengths)
        ]
        with self._plain_errors():
            for rank, part in enumerate(parts):
                if len(part):
                    dist.broadcast(part, src=dist.get_global_rank(self._group, rank), group=self._group)
        return parts

    def smallest(self, number: int) -> int:
        self.finished()
        return min(int(part) for part in self._all_gather(torch.tensor([number])))

    def check_same(self, **values: Any) -> None:
        self.finished()
        for name, value in values.items():
            told = [_text(part) for part in self._all_gather(_bytes(repr(value)))]
            if len(set(told)) > 1:
                raise ValueError(f"{name}: expected the same in all {self.size} processes, got {told}")

    def _meet(self, status: int, message: str = "") -> bool:
        """Waits for all processes; whether all have done their work."""
        told = self._all_gather(torch.cat([torch.tensor([status], dtype=torch.uint8), _bytes(message)]))
        self._last = time.monotonic()
        failed = [(rank, _text(part[1:])) for rank, part in enumerate(told) if part[0] == _FAILED]
        if failed:
            self._over = True
            raise ConnectionError(
                "; ".join(f"process {rank} of {self.size} failed: {text}" for rank, text in failed)
            )
        return all(part[0] == _DONE for part in told)

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._plain_errors():
            dist.all_gather(parts, tensor, group=self._group)
        return parts

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._over = True
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConnectionError(
                f"process {self.rank} of {self.size}: lost another process, which ended or did not answer for "
                f"{self.patience:.0f} s ({lines[-1]:.200})"
            ) from error


ALONE = Team()


@contextmanager
def the_team() -> Iterator[Team]:
    """The processes of the initialised ``torch.distributed`` group, or this one alone.

    An error inside is told to the other processes, which then raise too instead of waiting.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield ALONE
        return
    group = Group(PATIENCE)
    try:
        yield group
    except GeneratorExit:
        raise
    except BaseException as error:
        group.failed(error)
        raise
    finally:
        group.close()


def _bytes(text: str) -> Tensor:
    """``[_MESSAGE_BYTES]`` uint8, padded with zeros or cut."""
    raw = text.encode()[:_MESSAGE_BYTES]
    return torch.tensor([*raw, *bytes(_MESSAGE_BYTES - len(raw))], dtype=torch.uint8)


def _text(message: Tensor) -> str:
    return bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")
