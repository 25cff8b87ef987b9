"""How much of an answer passes through given concepts, and how much reaches it past them, with an interval.

*Pattern matching* is influence that runs from tokens to a logit past a set of concepts; *multi-hop* is what passes
through them::

    multi-hop share = 1 - (influence of the tokens along paths avoiding the concepts) / (influence of the tokens)
"""

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fasttc.graph.graph import Graph
from fasttc.graph.influence import Array
from fasttc.graph.paths import influence_avoiding, whole_graph
from fasttc.graph.pruned import PrunedGraph

_LEVEL = 0.95


@dataclass(frozen=True)
class Mechanism:
    """One logit of one prompt. All numbers are shares of 0 to 1.

    Attributes:
        multi_hop: share of the tokens' influence that passes through the concepts; ``nan`` where tokens have none.
        direct: share of the tokens' influence that arrives by a single edge, through no feature at all.
        unexplained: share of the logit's whole influence that ends in errors or unstored edges, not in tokens.
        concepts: how many nodes of the graph are concepts.
    """

    multi_hop: float
    direct: float
    unexplained: float
    concepts: int


@dataclass(frozen=True)
class MechanismReport:
    """Several prompts. ``low`` and ``high`` bound the mean multi-hop share: a 95 % percentile bootstrap interval."""

    prompts: list[Mechanism]
    multi_hop: float
    low: float
    high: float
    direct: float
    unexplained: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def concept_nodes(graph: Graph, concepts: Collection[tuple[int, int]]) -> list[int]:
    """Nodes of ``graph`` whose feature (layer, index) is one of the concepts, at any position."""
    wanted = set(concepts)
    return [
        node for node, (layer, _, index) in enumerate(graph.features.tolist()) if (layer, index) in wanted
    ]


def concept_features(graph: Graph | PrunedGraph, nodes: Iterable[int]) -> set[tuple[int, int]]:
    """(layer, index) of the features among some nodes of ``whole_graph(graph)``."""
    features = whole_graph(graph).features
    return {(int(features[node, 0]), int(features[node, 2])) for node in nodes if node < len(features)}


def mechanism(graph: Graph | PrunedGraph, nodes: Iterable[int], logit: int = 0) -> Mechanism:
    """Shares of one logit.

    Args:
        graph: a graph, or a pruned graph (then of its kept part; what was dropped is unexplained).
        nodes: the concepts, by node number of ``whole_graph(graph)``.
        logit: which one, in the order of the graph.

    Raises:
        ValueError: a node or a logit that does not exist.
    """
    graph, nodes = whole_graph(graph), list(nodes)
    features = range(graph.n_features)
    tokens, past, direct = (
        float(influence_avoiding(graph, avoided, logit)[graph.token_slice].sum())
        for avoided in ([], nodes, features)
    )
    known = tokens > 0
    return Mechanism(
        multi_hop=1 - past / tokens if known else float("nan"),
        direct=direct / tokens if known else float("nan"),
        unexplained=1 - tokens,
        concepts=len(set(nodes)),
    )


def mechanism_report(
    graphs: Iterable[Graph | PrunedGraph],
    concepts: Collection[tuple[int, int]],
    *,
    logit: int = 0,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> MechanismReport:
    """Shares of several prompts with a bootstrap interval of the mean multi-hop share.

    Args:
        graphs: one for each prompt; read one after another, so a generator will do.
        concepts: features (layer, index) that stand for the intermediate concept, at any position. Choose them on
            other prompts.
        logit: which logit of each graph.
        clusters: one label for each prompt; prompts of one label are drawn together. None: each on its own.
        resamples: of the bootstrap.
        seed: of the bootstrap; the result is a function of it and the graphs.

    Raises:
        ValueError: no graph, or another number of labels; as :func:`mechanism`.
    """
    found = []
    for graph in graphs:
        whole = whole_graph(graph)
        found.append(mechanism(whole, concept_nodes(whole, concepts), logit))
    if not found:
        raise ValueError("graphs: expected at least one, got none")
    shares = np.array([one.multi_hop for one in found])
    low, high = bootstrap_interval(shares, clusters, resamples=resamples, seed=seed)
    return MechanismReport(
        prompts=found,
        multi_hop=_mean(shares),
        low=low,
        high=high,
        direct=_mean([one.direct for one in found]),
        unexplained=_mean([one.unexplained for one in found]),
    )


def bootstrap_draws(clusters: Sequence[Hashable], resamples: int, seed: int) -> Array:
    """``[resamples, prompts]`` int64: how often each prompt is drawn when whole clusters are drawn with replacement."""
    number = {label: at for at, label in enumerate(dict.fromkeys(clusters))}
    owner = np.array([number[label] for label in clusters])
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(number), size=(resamples, len(number)))
    counts = np.zeros((resamples, len(number)), np.int64)
    np.add.at(counts, (np.arange(resamples)[:, None], drawn), 1)
    return counts[:, owner]


def bootstrap_interval(
    values: Any, clusters: Sequence[Hashable] | None = None, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean; values that are not numbers are left out of it."""
    array = np.asarray(values, np.float64)
    labels = range(len(array)) if clusters is None else clusters
    if len(labels) != len(array):
        raise ValueError(f"clusters: expected {len(array)} labels, got {len(labels)}")
    counts = bootstrap_draws(labels, resamples, seed) * np.isfinite(array)
    sums, sizes = counts @ np.nan_to_num(array), counts.sum(axis=1)
    means = sums[sizes > 0] / sizes[sizes > 0]
    if not means.size:
        return float("nan"), float("nan")
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def _mean(values: Any) -> float:
    array = np.asarray(values, np.float64)
    finite = array[np.isfinite(array)]
    return float(finite.mean()) if finite.size else float("nan")
