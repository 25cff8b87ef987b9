"""Centred, half-whitened inputs: the coordinates in which encoders learn.

Adam moves every weight by about the same step. Where the inputs x of an MLP are much larger in some directions than in
others, the small ones are learnt late; and where x has a large mean, every step of an encoder row is for the most part
a step of its bias. So training reads ``x' = (x - mean) S`` with ``S = (covariance + λ)^(-1/4)``, and the encoder is
written in the same coordinates: ``W' = W S^-1``, ``b' = b + W mean``. The transcoder is the same function of x, with
the same pre-activations; only the path of the optimiser is another. Half of a whitening (which is the power -1/2) was
better than a whole one and than none, from scratch and adapting.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasttc.nn import Transcoder
from fasttc.training.activations import Source, WrappedSource
from fasttc.training.packing import TokenBatch

POWER = -0.25
"""Of the covariance, in S."""
SHRINKAGE = 0.01
"""λ, in mean variances of a coordinate of x: directions that a sample hardly shows are not blown up."""
ROWS_AT_ONCE = 2**15
"""Of a weight that are held in float64."""


class Coordinates(NamedTuple):
    """``x' = (x - mean) squeeze``, and back ``x = x' stretch + mean``; float64.

    Attributes:
        mean: [D]; squeeze: S [D, D], symmetric; stretch: its inverse.
    """

    mean: Tensor
    squeeze: Tensor
    stretch: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor) -> "Coordinates":
        """Those of a sample x [N, D]. Where all tokens are alike, S is the identity."""
        mean = x.double().mean(0)
        centred = x.double() - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(x))
        variances = variances.clamp(min=0) + SHRINKAGE * variances.mean()
        scale = variances.pow(POWER) if bool((variances > 0).all()) else torch.ones_like(variances)
        return cls(mean, directions * scale @ directions.T, directions / scale @ directions.T)

    def of_inputs(self, x: Tensor) -> Tensor:
        """x' of x, in its dtype."""
        return (x - self.mean.to(x.dtype)) @ self.squeeze.to(x.dtype)

    @torch.no_grad()
    def enter(self, transcoder: Transcoder) -> None:
        """Writes a transcoder of x as one of x'."""
        self._shift(transcoder, 1.0)
        self._multiply(transcoder, self.stretch)

    @torch.no_grad()
    def leave(self, transcoder: Transcoder) -> None:
        """Writes a transcoder of x' as one of x."""
        self._multiply(transcoder, self.squeeze)
        self._shift(transcoder, -1.0)

    def _shift(self, transcoder: Transcoder, sign: float) -> None:
        """Moves what the mean contributes into the biases, or out of them."""
        moved = [(transcoder.W_enc, transcoder.b_enc)]
        if transcoder.W_skip is not None:
            moved.append((transcoder.W_skip, transcoder.b_dec))
        for weight, bias in moved:
            for rows, entries in zip(weight.split(ROWS_AT_ONCE), bias.split(ROWS_AT_ONCE), strict=True):
                entries.add_(sign * (rows.double() @ self.mean))

    @staticmethod
    def _multiply(transcoder: Transcoder, matrix: Tensor) -> None:
        for weight in (transcoder.W_enc, transcoder.W_skip):
            for rows in () if weight is None else weight.split(ROWS_AT_ONCE):
                rows.copy_(rows.double() @ matrix)


class WhitenedSource(WrappedSource):
    """A source whose x are in the coordinates of their layers."""

    def __init__(self, source: Source, layers: Sequence[Coordinates]) -> None:
        super().__init__(source)
        self._layers = layers

    def read(self, batch: TokenBatch) -> tuple[list[Tensor], list[Tensor]]:
        xs, ys = super().read(batch)
        return [layer.of_inputs(x) for layer, x in zip(self._layers, xs, strict=True)], ys


class Whitening:
    """The coordinates of a training, from a sample of x of its own layers; without ``active`` everything stays.

    They follow from the sample alone, so that a run that resumes has them again.
    """

    def __init__(self, xs: Sequence[Tensor], *, active: bool = True) -> None:
        self.active = active
        self._layers = [Coordinates.of(x) for x in xs] if active else []

    def enter(
        self, source: Source, transcoders: Sequence[Transcoder], xs: Sequence[Tensor]
    ) -> tuple[Source, list[Tensor]]:
        """Writes the transcoders in the coordinates; (source, xs) there."""
        if not self.active:
            return source, list(xs)
        for layer, transcoder in zip(self._layers, transcoders, strict=True):
            layer.enter(transcoder)
        inside = [layer.of_inputs(x) for layer, x in zip(self._layers, xs, strict=True)]
        return WhitenedSource(source, self._layers), inside

    def leave(self, transcoders: Sequence[Transcoder]) -> None:
        """Writes the transcoders as functions of x again."""
        for layer, transcoder in zip(self._layers, transcoders, strict=False):
            layer.leave(transcoder)
