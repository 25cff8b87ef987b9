"""Closed-form decoders within a training: before it from a pass over the stream, after it from codes it made."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fasttc.nn import Transcoder
from fasttc.training.activations import Source
from fasttc.training.data import TokenData, TokenStream
from fasttc.training.distributed import Processes
from fasttc.training.options import TranscoderOptions
from fasttc.training.quality import LayerStatistics
from fasttc.training.refit import DecoderSums, refit
from fasttc.training.transcoding import TranscoderTask, stored_name
from fasttc.training.watch import Watch

HELD_OUT_TOKENS = 4096
"""Validation tokens whose activations are held: they choose the ridge, and give the scales of x and y."""
LOOKS = 20
"""Looks at held-out quality in the whole of a training that may stop early."""

Activations = tuple[list[Tensor], list[Tensor]]
"""x [N, D] and y [N, D_out] of every layer."""


@dataclass
class Refits:
    """What the closed forms did.

    Attributes:
        tokens: of the stream that the first one took.
        first, last: the ridge of every layer, in tokens; None for a layer where the decoder that was there is better
            on validation tokens, or codes were not finite; an empty list where there was no refit.
    """

    tokens: int = 0
    first: Sequence[float | None] = ()
    last: Sequence[float | None] = ()

    def of_all(self, processes: Processes) -> dict[str, Any]:
        """With the layers of all processes; JSON types."""
        parts = processes.gather(asdict(self))
        joined = {name: [ridge for part in parts for ridge in part[name]] for name in ("first", "last")}
        return {"tokens": self.tokens, **joined}


def sample(source: Source, data: TokenData, split: str, batch_size: int, n: int) -> Activations:
    """x and y of about ``n`` tokens of a split at every own site, in its fixed order.

    Raises:
        ValueError: fewer than two usable tokens; activations that are not finite, with the layer.
    """
    parts = [source.read(b) for b in data.batches(split, batch_size, max_tokens=n)]
    own = range(len(parts[0][0]))
    xs, ys = ([torch.cat([part[side][i] for part in parts])[:n] for i in own] for side in (0, 1))
    if xs and len(xs[0]) < 2:
        raise ValueError(
            f"data: expected {split} documents of at least three tokens, got none among the first"
        )
    for site, x, y in zip(source.sites[source.own], xs, ys, strict=True):
        if not bool(x.isfinite().all() & y.isfinite().all()):
            raise ValueError(
                f"model: expected finite activations, got infinite ones or NaN at layer {site.layer}"
            )
    return xs, ys


def refit_first(
    source: Source,
    transcoders: Sequence[Transcoder],
    stream: TokenStream,
    options: TranscoderOptions,
    held_out: Activations,
) -> Refits:
    """Reads ``options.first_tokens()`` of the stream and puts the best decoders for the present encoders in place."""
    wanted, taken = options.first_tokens(), 0
    if not wanted:
        return Refits()
    sums = [DecoderSums(transcoder) for transcoder in transcoders]
    while taken < wanted:
        batch = stream.next()
        taken += batch.n_tokens
        for transcoder, total, x, y in zip(transcoders, sums, *source.read(batch), strict=True):
            with torch.no_grad():
                total.add(transcoder.train().encode(x), x, y)
    return Refits(taken, _refit_all(transcoders, sums, held_out))


def collect_after(options: TranscoderOptions, updates: int, share: float) -> int | None:
    """The update after a share of all, from which codes are added up for the last refit; None: there will be none."""
    return int(share * updates) if options.refit in ("last", "both") else None


def refit_last(task: TranscoderTask, held_out: Activations, refits: Refits) -> None:
    """Puts the best decoders for the codes of the training in place, and notes their ridges.

    After an early stop the codes are also those of the updates after the best look. Like the older ones they are of
    an encoder a little away from the one that is kept; held-out tokens decide, as always, whether that helps.
    """
    if task.sums:
        refits.last = _refit_all(task.transcoders, task.sums, held_out)


def _refit_all(
    transcoders: Sequence[Transcoder], sums: Sequence[DecoderSums], held_out: Activations
) -> list[float | None]:
    """The ridge of every layer; a layer whose codes overflowed (it diverged) keeps the decoder that is there."""
    return [
        refit(transcoder.eval(), total, x, y) if total.finite else None
        for transcoder, total, x, y in zip(transcoders, sums, *held_out, strict=True)
    ]


def held_out_watch(
    task: TranscoderTask, held_out: Activations, options: TranscoderOptions, steps: int
) -> Watch | None:
    """Looks at the mean FVU on held-out tokens, :data:`LOOKS` times in all; None without ``options.patience``."""
    if options.patience is None:
        return None
    tensors = {
        stored_name(n, t, name): tensor
        for n, t in zip(task.numbers, task.transcoders, strict=True)
        for name, tensor in (*t.named_parameters(), *t.named_buffers())
    }

    def measure() -> float:
        found = []
        for transcoder, x, y in zip(task.transcoders, *held_out, strict=True):
            statistics = LayerStatistics(transcoder.eval())
            statistics.add(x, y)
            transcoder.train()
            found.append(statistics.result(0).fvu)
        whole = [fvu for part in task.processes.gather(found) for fvu in part]
        return sum(whole) / len(whole)

    return Watch(max(1, steps // LOOKS), options.patience, measure, tensors)
