"""Which rows a graph gets, and in which order they are computed: all features, or the most influential ones."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fasttc.attribution.rank import Ranking
from fasttc.attribution.rows import EdgeWriter, Kept
from fasttc.attribution.shelf import Shelf
from fasttc.attribution.sources import Sources
from fasttc.attribution.targets import Root, root_targets
from fasttc.attribution.trace import Progress, Sweep, feature_targets

_FIRST_GUESS = 0.3  # part of a row's edges that top-mass rows are given room for at first


def collect_rows(
    sweep: Sweep,
    roots: Sequence[Root],
    *,
    share: float,
    limit: int | None,
    refresh: int,
    progress: Progress | None = None,
) -> tuple[Kept, EdgeWriter]:
    """Edges into the roots and into the features that become nodes: those rows that this process traced.

    Args:
        sweep: of the prompt.
        roots: what the graph explains.
        share: of each row's absolute sum that stored edges reach.
        limit: feature nodes at most, None for all that can matter.
        refresh: features between two rankings.
        progress: called with shares of the work.
    """
    reachable = _reachable(sweep.sources, roots)
    count = int(reachable.sum())
    if limit is not None and limit < count:
        return _most_influential(sweep, roots, reachable, share, limit, refresh, progress)
    return _all(sweep, roots, reachable if count < len(reachable) else None, share, progress)


def _reachable(sources: Sources, roots: Sequence[Root]) -> Tensor:
    """``[n_features]`` bool: features from which a path of edges to a root can exist."""
    reached = torch.zeros(sources.n_features, dtype=torch.bool, device=sources.embedding.device)
    for root in roots:
        for number in range(root.point.depth):
            first = sources.feature_ptr[number]
            reached[first : first + sources.layers[number].before[root.position + 1]] = True
    return reached


def _all(
    sweep: Sweep, roots: Sequence[Root], chosen: Tensor | None, share: float, progress: Progress | None
) -> tuple[Kept, EdgeWriter]:
    """All features, or the chosen ones; blocks become rows as they come."""
    sources = sweep.sources
    nodes = None if chosen is None else chosen.nonzero()[:, 0]
    kept = Kept(None if nodes is None else nodes.tolist(), sources.n_features)
    groups = [*feature_targets(sweep.model, sources, nodes), *root_targets(roots, sources.n_features)]
    room = sum(
        count * sources.width(groups[cohort.group].point.depth, position + 1)
        for cohort in sweep.cohorts(groups)
        for position, count in Counter(groups[cohort.group].positions[cohort.start : cohort.stop]).items()
    )
    writer = EdgeWriter(sources, kept, share, room if share == 1 else int(room * _FIRST_GUESS))
    for block in sweep.blocks(groups, progress):
        writer.write(block)
    return kept, writer


def _most_influential(
    sweep: Sweep,
    roots: Sequence[Root],
    reachable: Tensor,
    share: float,
    limit: int,
    refresh: int,
    progress: Progress | None,
) -> tuple[Kept, EdgeWriter]:
    """A few features at a time, ranked again in between by the rows known so far. Blocks are kept until the end."""
    with Shelf(sweep.budget.rows) as shelf:
        ranking = Ranking(
            sweep.sources,
            torch.tensor([root.weight for root in roots]).to(sweep.sources.embedding),
            shelf,
            sweep.team,
        )
        open_ = _rank_and_trace(sweep, roots, ranking, reachable, limit, refresh, progress)
        kept = Kept((reachable & ~open_).nonzero()[:, 0].tolist(), sweep.sources.n_features)
        room = sum(block.values.numel() for block in ranking.blocks) * limit // sweep.sources.n_features
        writer = EdgeWriter(sweep.sources, kept, share, room)
        for block in ranking.blocks:
            writer.write(replace(block, values=block.values.to(reachable.device)))
    return kept, writer


def _rank_and_trace(
    sweep: Sweep,
    roots: Sequence[Root],
    ranking: Ranking,
    reachable: Tensor,
    limit: int,
    refresh: int,
    progress: Progress | None,
) -> Tensor:
    """Fills the ranking with rows of targets and chosen features; ``[n_features]`` bool: features not chosen."""
    for block in sweep.blocks(root_targets(roots, sweep.sources.n_features)):
        ranking.add(block)
    open_, done = reachable.clone(), 0
    while done < limit:
        nodes = ranking.next(open_, min(refresh, limit - done))
        open_[nodes] = False
        done += len(nodes)
        part = len(nodes) / limit
        scaled = None if progress is None else lambda work, part=part: progress(work * part)
        for block in sweep.blocks(feature_targets(sweep.model, sweep.sources, nodes), scaled):
            ranking.add(block)
    return open_
