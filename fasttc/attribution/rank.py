"""Which features deserve a row: those with the most influence on the targets, given the rows known so far."""

from dataclasses import replace

import torch
from torch import Tensor

from fasttc.attribution.rows import RowBlock, segments
from fasttc.attribution.shelf import Shelf
from fasttc.attribution.sources import Sources
from fasttc.attribution.team import ALONE, Team

_MASS_FLOOR = 1e-10  # a row without edges passes nothing on


class Ranking:
    """Influence of all active features through the rows computed so far.

    A row ``t`` passes its own influence on to its sources ``s`` in the shares ``|A[t, s]| / sum_s |A[t, s]|``, as in
    ``Graph.influence``. Edges run downwards, so one pass over the blocks from the top layer settles all of them:
    each block is read once, in place.

    Args:
        sources: of the prompt.
        weights: ``[K]`` of the targets, whose rows follow those of the features.
        shelf: keeps the rows.
        team: processes that each hold a part of the rows.
    """

    def __init__(self, sources: Sources, weights: Tensor, shelf: Shelf, team: Team = ALONE) -> None:
        self.sources, self.weights, self.shelf, self.team = sources, weights, shelf, team
        self.blocks: list[RowBlock] = []
        self._mass: list[Tensor] = []

    def add(self, block: RowBlock) -> None:
        """Takes a block of rows; it is kept."""
        self._mass.append(torch.linalg.vector_norm(block.values, ord=1, dim=1))
        self.blocks.append(replace(block, values=self.shelf.put(block.values)))

    def influence(self) -> Tensor:
        """``[n_features]`` float64, the same in all processes; deterministic."""
        n_features = self.sources.n_features
        arrived = self.weights.new_zeros(n_features + len(self.weights), dtype=torch.float64)
        arrived[n_features:] = self.weights
        for height in [None, *reversed(range(1, self.sources.n_layers))]:
            passed_on = torch.zeros_like(arrived)
            for block, mass in zip(self.blocks, self._mass, strict=True):
                if self._height(block) == height:
                    self._pass_on(block, arrived[block.rows] / mass.clamp_min(_MASS_FLOOR), passed_on)
            arrived += self.team.sum(passed_on)
        return arrived[:n_features]

    def _height(self, block: RowBlock) -> int | None:
        """Depth of features; None of targets, which come first: nothing passes anything on to them."""
        return None if bool(block.rows[0] >= self.sources.n_features) else block.point.depth

    def _pass_on(self, block: RowBlock, passed: Tensor, total: Tensor) -> None:
        for part in segments(self.sources, block.point, block.positions.span):
            if part.kind == "feature":
                shares = block.values[:, part.start : part.stop].to(passed.device).abs()
                total[part.node : part.node + part.stop - part.start] += passed.to(shares.dtype) @ shares

    def next(self, candidates: Tensor, count: int) -> Tensor:
        """Columns, ascending, of the ``count`` most influential ``candidates`` (``[n_features]`` bool)."""
        score = self.influence().masked_fill(~candidates, -1)
        return score.sort(descending=True, stable=True).indices[:count].sort().values
