"""Which features deserve a row: those with the most influence on the targets, given the rows known so far."""

import torch
from torch import Tensor

from fasttc.attribution.rows import RowBlock, segments
from fasttc.attribution.sources import Sources

_MASS_FLOOR = 1e-10  # a row without edges passes nothing on


class Ranking:
    """Influence of all active features through the rows computed so far.

    A row ``t`` passes its own influence on to its sources ``s`` in the shares ``|A[t, s]| / sum_s |A[t, s]|``, as in
    ``Graph.influence``. Edges run downwards, so one pass over the blocks from the top layer settles all of them:
    each block is read once, in place.

    Args:
        sources: of the prompt.
        weights: ``[K]`` of the targets, whose rows follow those of the features.
    """

    def __init__(self, sources: Sources, weights: Tensor) -> None:
        self.sources, self.weights = sources, weights
        self.blocks: list[RowBlock] = []
        self._mass: list[Tensor] = []

    def add(self, block: RowBlock) -> None:
        """Takes a block of rows; it is kept."""
        self.blocks.append(block)
        self._mass.append(torch.linalg.vector_norm(block.values, ord=1, dim=1))

    def influence(self) -> Tensor:
        """``[n_features]`` in the dtype of the rows; deterministic."""
        arrived = self._mass[0].new_zeros(self.sources.n_features + len(self.weights))
        arrived[self.sources.n_features :] = self.weights
        for number in sorted(range(len(self.blocks)), key=self._height, reverse=True):
            block = self.blocks[number]
            passed = arrived[block.rows] / self._mass[number].clamp_min(_MASS_FLOOR)
            for part in segments(self.sources, block.point, block.positions.span):
                if part.kind == "feature":
                    shares = block.values[:, part.start : part.stop].abs()
                    arrived[part.node : part.node + part.stop - part.start] += passed @ shares
        return arrived[: self.sources.n_features]

    def _height(self, number: int) -> tuple[bool, int]:
        """Targets come first, whatever their layer: nothing passes anything on to them."""
        block = self.blocks[number]
        return bool(block.rows[0] >= self.sources.n_features), block.point.depth

    def next(self, candidates: Tensor, count: int) -> Tensor:
        """Columns, ascending, of the ``count`` most influential ``candidates`` (``[n_features]`` bool)."""
        score = self.influence().masked_fill(~candidates, -1)
        return score.sort(descending=True, stable=True).indices[:count].sort().values
