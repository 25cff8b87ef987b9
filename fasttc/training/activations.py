"""What transcoders see: inputs and outputs of every MLP for a block of tokens, straight from the running model.

Of several processes each runs the model on some rows of the block, and is then given all tokens of some layers, or of
all of them where it is features that are shared out.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from fasttc.models import evaluating
from fasttc.models.anatomy import anatomy
from fasttc.models.capture import capture
from fasttc.nn import Site
from fasttc.training.distributed import Processes
from fasttc.training.packing import TokenBatch


class Source(Protocol):
    """Gives x and y of a block at every site; of several processes to each those of its own sites."""

    @property
    def sites(self) -> list[Site]: ...

    @property
    def processes(self) -> Processes: ...

    @property
    def own(self) -> slice: ...

    def places(self, batch: TokenBatch) -> Tensor: ...

    def read(self, batch: TokenBatch) -> tuple[list[Tensor], list[Tensor]]: ...


class ActivationSource:
    """Runs a model without its language-model head and reads (x, y) at every site. Nothing is written to disk.

    Made by :func:`activation_source`, which puts the hooks in place and takes them off.
    """

    def __init__(
        self,
        trunk: nn.Module,
        record,
        entrance: torch.device,
        rows: int | None = None,
        processes: Processes | None = None,
        device: str | None = None,
        everywhere: bool = False,
    ) -> None:
        self._trunk = trunk
        self._record = record
        self._entrance = entrance
        self._rows = rows
        self._runners = processes or Processes()
        self._readers = Processes() if everywhere else self._runners
        self._device = device

    @property
    def sites(self) -> list[Site]:
        """Of all processes."""
        return self._record.sites

    @property
    def processes(self) -> Processes:
        """Those that share out the sites; this one alone where each reads them all."""
        return self._readers

    @property
    def own(self) -> slice:
        """Which of the sites this process reads."""
        return self._readers.share(len(self.sites))

    def places(self, batch: TokenBatch) -> Tensor:
        """Where the tokens that :meth:`read` gives stand in the flattened block, ``[N]`` int64, ascending."""
        skipped = max(site.zero_positions for site in self.sites)
        return (batch.mask & (batch.position_ids >= skipped)).flatten().nonzero()[:, 0]

    @torch.no_grad()
    def read(self, batch: TokenBatch) -> tuple[list[Tensor], list[Tensor]]:
        """Lists of x [N, D] and y [N, D_out], float32 (float64 in a float64 model), one per own site.

        They are where the source's device is, or else where the model has the layer.
        The N tokens are those of ``batch.mask`` (neither padding nor first of their document), in order. Positions
        the sites zero beyond the first are left out too.
        """
        kept = torch.zeros(batch.mask.numel(), dtype=torch.bool)
        kept[self.places(batch).cpu()] = True
        kept = kept.view_as(batch.mask)
        runners = self._runners
        shares = [runners.share(len(kept), rank) for rank in range(runners.size)]
        xs, ys = self._run(batch, kept, shares[runners.rank])
        if runners.size == 1:
            return xs, ys
        return self._regroup(xs, ys, [int(kept[share].sum()) for share in shares])

    def _run(self, batch: TokenBatch, kept: Tensor, share: slice) -> tuple[list[Tensor], list[Tensor]]:
        """x and y at all sites of the kept tokens in some rows of a block; ``kept`` [B, T] bool."""
        if share.start == share.stop:  # a process without rows runs one, and keeps nothing of it
            share, kept = slice(0, 1), torch.zeros_like(kept)
        ids, positions = (t[share].to(self._entrance) for t in (batch.input_ids, batch.position_ids))
        kept = kept[share]
        rows = self._rows or len(ids)
        found: list[tuple[list[Tensor], list[Tensor]]] = []
        for start in range(0, len(ids), rows):
            part = slice(start, start + rows)
            self._trunk(input_ids=ids[part], position_ids=positions[part], use_cache=False)
            places = kept[part].flatten().nonzero()[:, 0]
            xs, ys = (
                [_rows(t, places, self._device) for t in side] for side in (self._record.x, self._record.y)
            )
            found.append((xs, ys))
            self._record.clear()
        if len(found) == 1:
            return found[0]
        xs, ys = ([torch.cat(t) for t in zip(*(f[side] for f in found), strict=True)] for side in (0, 1))
        return xs, ys

    def _regroup(
        self, xs: list[Tensor], ys: list[Tensor], counts: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """From some tokens of all sites to all tokens of the sites that this process reads."""
        place = self._device or self._entrance
        columns = [torch.cat([x.to(place), y.to(place)], 1) for x, y in zip(xs, ys, strict=True)]
        found = (self._runners.regroup if self._readers is self._runners else self._runners.join)(
            columns, counts
        )
        widths = [x.shape[1] for x in xs[self.own]]
        return (
            [both[:, :d].contiguous() for both, d in zip(found, widths, strict=True)],
            [both[:, d:].contiguous() for both, d in zip(found, widths, strict=True)],
        )


class WrappedSource:
    """A source that reads another one; what it makes of that is in :meth:`read` of subclasses.

    Args:
        source: open for as long as this one is used.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def sites(self) -> list[Site]:
        return self.source.sites

    @property
    def processes(self) -> Processes:
        return self.source.processes

    @property
    def own(self) -> slice:
        return self.source.own

    def places(self, batch: TokenBatch) -> Tensor:
        """See :meth:`ActivationSource.places`."""
        return self.source.places(batch)

    def read(self, batch: TokenBatch) -> tuple[list[Tensor], list[Tensor]]:
        """See :meth:`ActivationSource.read`."""
        return self.source.read(batch)


class RememberedSource(WrappedSource):
    """A source that runs the model once for every piece of text and then answers from memory.

    For many trainings on one model and one text: the activations of a token depend on its document alone, however
    rows are packed, but for rounding. Needs ``8 * D`` bytes (float32) for every token and layer.

    Args:
        source: of the model; open for as long as this one is used.

    Attributes:
        source: that source.
        seconds: CPU time of this process that the model took.
        nbytes: of the activations in memory.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.seconds = 0.0
        self.nbytes = 0
        self._kept: dict[bytes, tuple[list[Tensor], list[Tensor]]] = {}

    def read(self, batch: TokenBatch) -> tuple[list[Tensor], list[Tensor]]:
        """See :meth:`ActivationSource.read`."""
        pieces = list(self._pieces(batch))
        if any(key not in self._kept for key, _ in pieces):
            self._run(batch, pieces)
        found = [self._kept[key] for key, _ in pieces]
        xs, ys = ([torch.cat(t) for t in zip(*(f[side] for f in found), strict=True)] for side in (0, 1))
        return xs, ys

    def _run(self, batch: TokenBatch, pieces: Sequence[tuple[bytes, int]]) -> None:
        started = time.process_time()
        lengths = [length for _, length in pieces]
        xs, ys = ([t.split(lengths) for t in part] for part in self.source.read(batch))
        self.seconds += time.process_time() - started
        for i, (key, _) in enumerate(pieces):
            if key not in self._kept:
                self._kept[key] = [x[i].clone() for x in xs], [y[i].clone() for y in ys]
                self.nbytes += sum(t.nbytes for part in self._kept[key] for t in part)

    def _pieces(self, batch: TokenBatch) -> Iterator[tuple[bytes, int]]:
        """Of every piece of text in a block, in order: its tokens, and how many of them are read."""
        kept = torch.zeros(batch.mask.numel(), dtype=torch.bool)
        kept[self.places(batch)] = True
        starts = (batch.position_ids == 0).flatten().nonzero()[:, 0].tolist()
        ids = batch.input_ids.flatten().numpy()
        for start, stop in pairwise([*starts, len(ids)]):
            length = int(kept[start:stop].sum())
            if length:
                yield ids[start:stop].tobytes(), length


@contextmanager
def activation_source(
    model: nn.Module,
    sites: Sequence[Site],
    source: Source | None = None,
    rows: int | None = None,
    processes: Processes | None = None,
    device: str | None = None,
    everywhere: bool = False,
) -> Iterator[Source]:
    """Yields an :class:`ActivationSource`; the model is in evaluation mode meanwhile and as before afterwards.

    Args:
        model, sites: where to read.
        source: yielded instead, if it reads at these layers.
        rows: of a block that pass the model together; None: all.
        processes: that share out the rows of a block and the sites; None: this one alone.
        device: where x and y go; None: they stay where the model has the layer.
        everywhere: every process reads all sites.

    Raises:
        ValueError: a source of other sites or processes.
    """
    if source is not None:
        places = [[(site.layer, site.x, site.y) for site in each] for each in (sites, source.sites)]
        if places[0] != places[1]:
            raise ValueError(f"source: expected the sites {places[0]}, got {places[1]}")
        wanted = 1 if everywhere or processes is None else processes.size
        if source.processes.size != wanted:
            raise ValueError(
                f"source: expected one of {wanted} processes, got one of {source.processes.size}"
            )
        yield source
        return
    trunk = model.get_submodule(anatomy(model).trunk)
    entrance = next(model.parameters()).device
    if entrance.type == "meta":  # weights that accelerate fetches when they are needed
        entrance = torch.device("cpu")
    with evaluating(model), capture(model, sites) as record:
        yield ActivationSource(trunk, record, entrance, rows, processes, device, everywhere)


def _rows(t: Tensor, kept: Tensor, device: str | None) -> Tensor:
    rows = t.reshape(-1, t.shape[-1]).index_select(0, kept.to(t.device)).to(device or t.device)
    return rows if rows.dtype == torch.float64 else rows.float()
