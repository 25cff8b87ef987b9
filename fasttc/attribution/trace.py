"""The sweep: rows of the graph for any set of targets.

Targets of one layer form cohorts (:mod:`fasttc.attribution.plan`). A cohort's gradients enter at their own layer and
go down through the layers below it, over positions up to the last of theirs only; at each layer they are contracted
with the decoder rows of the features that are active there. One target costs what its own causal cone costs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttc import ops
from fasttc.attribution.linearize import LinearModel
from fasttc.attribution.plan import Budget, Point, bytes_per_target, cohorts
from fasttc.attribution.pullback import Pullback
from fasttc.attribution.rows import RowBlock, segments
from fasttc.attribution.sources import Sources

Progress = Callable[[float], Any]


@dataclass(frozen=True)
class Targets:
    """Targets that enter at one point, ordered by position.

    Attributes:
        point: where they enter.
        rows: ``[n]`` int64 row numbers.
        positions: n positions, ascending.
        vectors: ``vectors(start, stop)`` gives the gradients ``[stop - start, D]`` of a range of them with respect
            to the residual at their own positions.
    """

    point: Point
    rows: Tensor
    positions: list[int]
    vectors: Callable[[int, int], Tensor]


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
        encoders = layer.W_enc[layer.features[part]].to(sources.embedding.dtype)
        return linear.read_vjp(encoders, layer.positions[part])

    return Targets(
        point=Point(number, attention_first=not linear.parallel),
        rows=local + sources.feature_ptr[number],
        positions=layer.positions[local].tolist(),
        vectors=vectors,
    )


def sweep(
    model: LinearModel,
    sources: Sources,
    targets: Sequence[Targets],
    budget: Budget,
    *,
    progress: Progress | None = None,
) -> Iterator[RowBlock]:
    """Edges into all targets, cohort by cohort, groups in the order given and rows in the order of their group.

    Args:
        model: linear maps of the prompt.
        sources: where edges come from.
        targets: groups of targets.
        budget: memory of one cohort.
        progress: called after each cohort with the share of the work it was, by count of operations.

    Raises:
        ValueError: the budget does not hold a single target.
    """
    planned = [(group, *part) for group in targets for part in _planned(model, sources, group, budget)]
    work = [_work(group, start, stop) for group, start, stop in planned]
    token_rows = None
    for (group, start, stop), share in zip(planned, work, strict=True):
        yield _trace(model, sources, group, start, stop, token_rows)
        if progress is not None:
            progress(share / sum(work))


def _planned(
    model: LinearModel, sources: Sources, group: Targets, budget: Budget
) -> Iterator[tuple[int, int]]:
    width, item_size = sources.embedding.shape[1], sources.embedding.element_size()

    def cost(length: int) -> int:
        return bytes_per_target(model, sources, group.point, length)

    return cohorts(group.positions, width, item_size, cost, budget)


def _work(group: Targets, start: int, stop: int) -> float:
    """Operations of a cohort up to a constant: layers passed times positions reached."""
    return (stop - start) * (group.positions[stop - 1] + 1) * (group.point.depth + 0.5)


@torch.no_grad()
def _trace(
    model: LinearModel, sources: Sources, group: Targets, start: int, stop: int, token_rows: Tensor | None
) -> RowBlock:
    positions = group.positions[start:stop]
    pull = Pullback(group.vectors(start, stop), positions)
    values = pull.gradient.new_empty(stop - start, sources.width(group.point.depth, pull.length))
    parts = {(part.kind, part.layer): part for part in segments(sources, group.point.depth, pull.length)}
    own = torch.tensor(positions, device=values.device)
    if group.point.attention_first:
        pull.through(model.layers[group.point.depth].without_skip())
    for number in reversed(range(group.point.depth)):
        layer, linear = sources.layers[number], model.layers[number]
        gradient = linear.write_vjp(pull.gradient)
        place = parts["feature", number]
        count = place.stop - place.start
        values[:, place.start : place.stop] = ops.edges(
            gradient.transpose(0, 1),
            layer.W_dec,
            layer.features[:count],
            layer.positions[:count],
            layer.activations[:count],
            target_positions=own,
        )
        place = parts["error", number]
        values[:, place.start : place.stop] = _dots(gradient, layer.errors)[:, layer.zeroed :]
        pull.through(linear)
    place = parts["token", -1]
    values[:, place.start : place.stop] = _dots(pull.gradient, sources.embedding)
    return RowBlock(group.point, group.rows[start:stop], positions, values)


def _dots(gradient: Tensor, vectors: Tensor) -> Tensor:
    """``out[b, t] = <gradient[t, b], vectors[t]>``: ``[n, P]``."""
    return torch.bmm(gradient, vectors[: len(gradient), :, None])[:, :, 0].T
