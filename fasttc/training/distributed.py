"""Several processes on one training: who does what, and how the parts come together again.

Started with ``torchrun --nproc-per-node P -m fasttc train ...``, every process reads the same data in the same order
and

* runs the model on its share of the rows of every block (data-parallel);
* fine-tuning: the gradients of the shares are added up, and every process takes the same step;
* transcoders: every process owns some layers and is sent their inputs and outputs for the whole block (layer-parallel).
  So gradients never travel: a block's activations are smaller than the gradients of a transcoder with more features
  than the block has tokens, and each layer's update is the one a single process would make;
* or every process owns some features of all layers, for layers too wide for one process
  (:mod:`fasttc.training.sharded`).

All of it goes through one object, :class:`Processes`, which alone answers trivially: a single process runs the same
code.
"""

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

TIMEOUT = 300
"""Seconds after which a process that does not answer counts as lost, unless FASTTC_TIMEOUT says otherwise. One that has
ended is noticed at once, by its closed connection."""


class ProcessLost(ConnectionError):
    """Another process of the same training has ended or does not answer."""


class Processes:
    """The processes of one training, as seen by one of them.

    Attributes:
        rank: number of this one, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, n: int, rank: int | None = None) -> slice:
        """The contiguous part of ``n`` things that falls to a process, this one by default; possibly empty."""
        rank = self.rank if rank is None else rank
        return slice(n * rank // self.size, n * (rank + 1) // self.size)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, on all of them, in order of rank."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on all of them."""
        return value

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all processes: the same bits on all of them."""

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape and dtype, in order of rank."""
        return [tensor]

    def spread(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Overwrites tensors with those of the process ``rank``."""

    def regroup(self, columns: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """From some rows of everything to all rows of something.

        Args:
            columns: for every item, this process's rows [rows[rank], width]; widths may differ, dtypes must not.
            rows: how many rows each process has.

        Returns:
            For every item that falls to this process (:meth:`share` of the items), all rows in order of rank.
        """
        return list(columns)

    def join(self, columns: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """All rows of every item, on all processes; ``columns`` and ``rows`` as in :meth:`regroup`."""
        return list(columns)


class _Joined(Processes):
    """Processes that torch.distributed connects: gloo on CPUs, nccl on GPUs."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with _losses_named():
            torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        box = [value]
        with _losses_named():
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def add(self, tensors: Sequence[Tensor]) -> None:
        with _losses_named():
            for work in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                assert work is not None, "an asynchronous operation has a handle"
                work.wait()

    def collect(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with _losses_named():
            torch.distributed.all_gather(found, tensor.contiguous())
        return found

    def spread(self, tensors: Sequence[Tensor], rank: int) -> None:
        with _losses_named():
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=rank)

    def regroup(self, columns: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        shares = [self.share(len(columns), rank) for rank in range(self.size)]
        widths = [column.shape[1] for column in columns[shares[self.rank]]]
        received = [columns[0].new_empty(n, sum(widths)) for n in rows]
        operations = []
        for rank in range(self.size):
            theirs = columns[shares[rank]]
            sent = torch.cat(list(theirs), 1) if theirs else columns[0].new_empty(0, 0)
            if rank == self.rank:
                received[rank] = sent
                continue
            if sent.numel():
                operations.append(torch.distributed.P2POp(torch.distributed.isend, sent, rank))
            if received[rank].numel():
                operations.append(torch.distributed.P2POp(torch.distributed.irecv, received[rank], rank))
        with _losses_named():
            for work in torch.distributed.batch_isend_irecv(operations) if operations else []:
                work.wait()
        return list(torch.cat(received).split(widths, 1)) if widths else []

    def join(self, columns: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        widths = [column.shape[1] for column in columns]
        both = torch.cat(list(columns), 1)
        padded = torch.nn.functional.pad(both, (0, 0, 0, max(rows) - len(both)))
        parts = [part[:n] for part, n in zip(self.collect(padded), rows, strict=True)]
        return list(torch.cat(parts).split(widths, 1))


def processes() -> Processes:
    """Those of this run: of torchrun, or of a ``torch.distributed`` that is initialised; else this process alone.

    Under torchrun the first call connects them.

    Raises:
        ValueError: FASTTC_TIMEOUT is not a number of seconds.
        ProcessLost: the others did not come.
    """
    if not torch.distributed.is_available():
        return Processes()
    if not torch.distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes()
        _connect()
    return _Joined() if torch.distributed.get_world_size() > 1 else Processes()


def _connect() -> None:
    text = os.environ.get("FASTTC_TIMEOUT", str(TIMEOUT))
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"FASTTC_TIMEOUT: expected a number of seconds >= 1, got {text!r}")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    with _losses_named():
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=int(text)))
    atexit.register(_disconnect)


def _disconnect() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _losses_named() -> Iterator[None]:
    """Errors of a connection, which come as RuntimeError with the text of a C++ library, as ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ProcessLost(
            f"another process of this training has ended or did not answer in time ({reason})"
        ) from error
