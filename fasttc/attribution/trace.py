"""The sweep: rows of the graph for any set of targets.

Targets of one layer form cohorts (:mod:`fasttc.attribution.plan`). A cohort's gradients enter at their own layer and
go down through the layers below it, over positions up to the last of theirs only; at each layer they are contracted
with what is active there. One target costs what its own causal cone costs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttc.attribution.contract import Contraction, dots
from fasttc.attribution.linearize import LinearModel
from fasttc.attribution.plan import Budget, Point, bytes_per_target, check_budget, cohorts
from fasttc.attribution.positions import Positions
from fasttc.attribution.pullback import Pullback
from fasttc.attribution.rows import RowBlock, segments
from fasttc.attribution.sources import Sources
from fasttc.attribution.team import ALONE, Team
from fasttc.attribution.tokens import token_edges

Progress = Callable[[float], Any]

_COPY_SHARE = (
    8  # active decoder rows are copied side by side where that takes at most this part of the budget
)


@dataclass(frozen=True)
class Targets:
    """Targets that enter at one point, ordered by position.

    Attributes:
        point: where they enter.
        rows: ``[n]`` int64 row numbers.
        positions: of the targets.
        vectors: ``vectors(start, stop)`` gives the gradients ``[stop - start, D]`` of a range of them with respect
            to the residual at their own positions.
    """

    point: Point
    rows: Tensor
    positions: Positions
    vectors: Callable[[int, int], Tensor]

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Cohort:
    """Targets that go down together: ``start`` to ``stop`` of a group, and the operations they take, up to a factor."""

    group: int
    start: int
    stop: int
    work: float


def feature_targets(model: LinearModel, sources: Sources, chosen: Tensor | None = None) -> list[Targets]:
    """Active features as targets (of their pre-activations), one group per layer that has any.

    Args:
        model: linear maps of the prompt.
        sources: its features.
        chosen: columns of the wanted features, ascending; all when None.
    """
    groups = []
    for number in range(sources.n_layers):
        first, last = sources.feature_ptr[number : number + 2]
        if chosen is None:
            local = torch.arange(last - first, device=sources.embedding.device)
        else:
            local = chosen[(chosen >= first) & (chosen < last)] - first
        if len(local):
            groups.append(_layer_targets(model, sources, number, local))
    return groups


def _layer_targets(model: LinearModel, sources: Sources, number: int, local: Tensor) -> Targets:
    layer, linear = sources.layers[number], model.layers[number]

    def vectors(start: int, stop: int) -> Tensor:
        part = local[start:stop]
        encoders = layer.W_enc[layer.rows[part]].to(sources.embedding.dtype)
        return linear.read_vjp(encoders, layer.positions[part])

    return Targets(
        point=Point(number, attention_first=not linear.parallel),
        rows=local + sources.feature_ptr[number],
        positions=Positions.of(layer.positions[local]),
        vectors=vectors,
    )


class Sweep:
    """Edges into targets, cohort by cohort.

    Args:
        model: linear maps of the prompt.
        sources: where edges come from.
        budget: memory of one cohort.
        team: processes that share the cohorts.

    Raises:
        ValueError: the budget does not hold a single target.
    """

    def __init__(self, model: LinearModel, sources: Sources, budget: Budget, team: Team = ALONE) -> None:
        check_budget(budget, model, sources)
        self.model, self.sources, self.budget, self.team = model, sources, budget, team
        bytes_of_rows = sources.n_features * sources.embedding[0].nbytes
        copy = bytes_of_rows <= budget.limit // _COPY_SHARE
        by_op = sources.embedding.is_cuda
        self._contractions = [Contraction(layer, by_op=by_op, copy=copy) for layer in sources.layers]

    @torch.no_grad()
    def blocks(self, targets: Sequence[Targets], progress: Progress | None = None) -> Iterator[RowBlock]:
        """Rows of this process's targets: groups in the order given, rows in the order of their group.

        Returns when all processes have traced their part.

        Args:
            targets: groups of targets, of all processes together.
            progress: called after each cohort with the share of the work it was, by count of operations.
        """
        cohorts = self.cohorts(targets)
        work = sum(cohort.work for cohort in cohorts)
        tokens = self._token_edges(targets)
        for cohort in cohorts:
            yield self._trace(targets[cohort.group], cohort.start, cohort.stop, tokens[cohort.group])
            self.team.working()
            if progress is not None:
                progress(cohort.work / work)
        self.team.finished()

    def cohorts(self, targets: Sequence[Targets]) -> list[Cohort]:
        """This process's part of the targets. The split into cohorts is the same for any number of processes."""
        every = [
            Cohort(number, start, stop, _work(group, start, stop))
            for number, group in enumerate(targets)
            for start, stop in self._plan(group)
        ]
        owners = self.team.owners([cohort.work for cohort in every])
        return [cohort for cohort, owner in zip(every, owners, strict=True) if owner == self.team.rank]

    def _plan(self, group: Targets) -> Iterator[tuple[int, int]]:
        embedding = self.sources.embedding

        def cost(length: int) -> int:
            return bytes_per_target(self.model, self.sources, group.point.depth, length)

        return cohorts(group.positions, embedding.shape[1], embedding.element_size(), cost, self.budget)

    def _token_edges(self, targets: Sequence[Targets]) -> Sequence[Tensor | None]:
        """Edges of the tokens where they are found by going upwards: with many targets that saves each a layer."""
        passes = (
            self.sources.n_tokens * self.sources.n_layers
        )  # layers that tokens pass; a target passes one more
        if sum(map(len, targets)) <= passes:
            return [None] * len(targets)
        return token_edges(self.model, self.sources, targets, self.budget)

    def _trace(self, group: Targets, start: int, stop: int, tokens: Tensor | None) -> RowBlock:
        point, positions = group.point, group.positions[start:stop]
        parts = {(part.kind, part.layer): part for part in segments(self.sources, point, positions.span)}
        token_part = parts["token", -1]
        values = self.sources.embedding.new_zeros(stop - start, token_part.stop)
        pull = Pullback(group.vectors(start, stop), positions)
        lowest = (
            0 if tokens is None else 1
        )  # the first layer's attention lies between features and tokens only
        if point.attention_first and point.depth >= lowest:
            pull.through(self.model.layers[point.depth].without_skip())
        for number in reversed(range(point.depth)):
            gradient = self.model.layers[number].write_vjp(pull.gradient)
            for kind in ("feature", "error"):
                part = parts[kind, number]
                self._contractions[number].write(kind, gradient, positions, values[:, part.start : part.stop])
            if number >= lowest:
                pull.through(self.model.layers[number])
        out = values[:, token_part.start :]
        if tokens is not None:
            out[:] = tokens[start:stop, positions.length - out.shape[1] : positions.length]
        else:
            dots(pull.gradient, self.sources.embedding, positions, out)
        return RowBlock(point, group.rows[start:stop], positions, values)


def _work(group: Targets, start: int, stop: int) -> float:
    """Operations of a cohort up to a constant: layers passed times positions reached."""
    return (stop - start) * group.positions[stop - 1] * (group.point.depth + 0.5) + 1
