"""How well transcoders stand in for their MLPs, layer by layer, over a stream of blocks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttc.nn import Transcoder
from fasttc.training.activations import Source
from fasttc.training.packing import TokenBatch
from fasttc.training.sharded import group_of


@dataclass(frozen=True)
class LayerQuality:
    """One layer's transcoder on held-out tokens.

    Attributes:
        layer: of the model.
        fvu: fraction of variance unexplained, ``sum ||yhat - y||^2 / sum ||y - mean y||^2`` over all tokens.
        mse: ``mean_t ||yhat_t - y_t||^2``.
        l0: mean active features per token.
        dead: share of features that were active on none of these tokens.
        tokens: how many there were.
    """

    layer: int
    fvu: float
    mse: float
    l0: float
    dead: float
    tokens: int


class LayerStatistics:
    """Sums in float64 from which :class:`LayerQuality` follows; exact over any number of blocks.

    Of features that processes share out, each counts its own, and all call :meth:`result` together.
    """

    def __init__(self, transcoder: Transcoder) -> None:
        self._transcoder = transcoder
        device = transcoder.W_enc.device
        self._error = torch.zeros((), dtype=torch.float64, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)
        self._sum = torch.zeros(transcoder.d_out, dtype=torch.float64, device=device)
        self._active = torch.zeros((), dtype=torch.float64, device=device)
        self._fired = torch.zeros(len(transcoder.W_enc), dtype=torch.float64, device=device)
        self._tokens = 0
        self._shift: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Counts tokens x [N, D], y [N, D_out]."""
        if len(x) == 0:
            return
        acts = self._transcoder.encode(x)
        error = (self._transcoder.decode(acts, x).to(y.dtype) - y).double()
        # Squares are summed about the first block's mean: about zero they would cancel where the mean is large.
        self._shift = y.double().mean(0) if self._shift is None else self._shift
        centred = y.double() - self._shift
        self._error += error.square().sum()
        self._squares += centred.square().sum()
        self._sum += centred.sum(0)
        on = (acts.values != 0).to(self._fired.dtype).reshape(-1)
        self._active += on.sum()
        self._fired.index_add_(0, acts.indices.reshape(-1), on)
        self._tokens += len(x)

    def result(self, layer: int) -> LayerQuality:
        n = max(self._tokens, 1)
        variance = float(self._squares - self._sum.square().sum() / n)
        error = float(self._error)
        counts = torch.stack([self._active, (self._fired == 0).double().sum()])
        group_of(self._transcoder).add([counts])
        active, silent = counts.tolist()
        return LayerQuality(
            layer=layer,
            fvu=error / variance if variance > 0 else float("nan"),
            mse=error / n,
            l0=active / n,
            dead=silent / self._transcoder.n_features,
            tokens=self._tokens,
        )


def measure(
    source: Source, transcoders: Sequence[Transcoder], batches: Iterable[TokenBatch]
) -> list[LayerQuality]:
    """Quality of every own layer's transcoder on the given blocks, in evaluation mode."""
    modes = [transcoder.training for transcoder in transcoders]
    statistics = [LayerStatistics(transcoder.eval()) for transcoder in transcoders]
    try:
        for batch in batches:
            for statistic, x, y in zip(statistics, *source.read(batch), strict=True):
                statistic.add(x, y)
    finally:
        for transcoder, mode in zip(transcoders, modes, strict=True):
            transcoder.train(mode)
    return [s.result(site.layer) for s, site in zip(statistics, source.sites[source.own], strict=True)]


def mean_fvu(layers: Sequence[LayerQuality]) -> float:
    return sum(layer.fvu for layer in layers) / len(layers)
