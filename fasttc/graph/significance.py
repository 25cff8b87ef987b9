"""Which features' influence changed over a set of prompts, and is it more than chance.

Features only, wherever they are active: nodes, edges and paths belong to the positions of one prompt, and another
prompt has other positions. ``fasttc.graph.diff`` compares those of one prompt, without a test.
"""

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fasttc.graph.diff import Feature
from fasttc.graph.graph import Graph
from fasttc.graph.influence import Array, start_mass

_FLIPS_AT_ONCE = 256

_Key = tuple[Feature, str]  # and whose it is: "both", or "base" or "tuned" if it was not carried over


@dataclass(frozen=True)
class FeatureChange:
    """A feature over a set of prompts; of one that was not carried over, the base's or the fine-tuned model's.

    Attributes:
        feature: (layer, index).
        base, tuned: mean influence over the prompts, added over positions, as a share of the logits'; 0 in a prompt
            where the feature is not in the graph.
        p: of a two-sided sign-flip test of the mean paired difference.
        q: ``p`` after Benjamini and Hochberg over all features.
        in_base, in_tuned: share of the prompts in whose graph it is.
        trusted: False for a feature that was declared different in the two models. There are two of it: one with
            ``tuned`` 0 (lost), one with ``base`` 0 (gained).
    """

    feature: Feature
    base: float
    tuned: float
    p: float
    q: float
    in_base: float
    in_tuned: float
    trusted: bool = True

    @property
    def change(self) -> float:
        return self.tuned - self.base

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "change": self.change}


def feature_influence(graph: Graph) -> dict[Feature, float]:
    """Influence of each feature, added over positions, as a share of that of the logits."""
    layers, _, indices = graph.features.T.tolist() if graph.n_features else ([], [], [])
    total = start_mass(graph).sum()
    found: dict[Feature, float] = {}
    for layer, index, influence in zip(layers, indices, graph.influence().tolist(), strict=False):
        found[layer, index] = found.get((layer, index), 0.0) + influence / total
    return found


def feature_changes(
    pairs: Iterable[tuple[Graph, Graph]],
    *,
    carried: Collection[Feature] | None = None,
    flips: int = 4999,
    seed: int = 0,
) -> list[FeatureChange]:
    """Paired comparison of all features over prompts.

    Under the hypothesis that fine-tuning changed nothing for a feature, the sign of each prompt's difference is
    random; ``p`` is the share of ``flips`` random sign patterns (the observed one counted) with a mean at least as far
    from 0. All features are tested with the same patterns.

    Args:
        pairs: whole graphs of each prompt in the base and in the fine-tuned model; read one after another.
        carried: features that still mean the same; None: all. Others are not paired: they count as lost in one model
            and gained in the other, as in :func:`fasttc.graph.diff`. Features of adapters are always paired.
        flips: random sign patterns; the smallest possible ``p`` is ``1 / (flips + 1)``.
        seed: of the patterns.

    Returns:
        All features, largest change first. A function of the arguments and the seed.

    Raises:
        ValueError: no prompts.
    """
    trusted = None if carried is None else set(carried)
    sides: tuple[list[dict[_Key, float]], list[dict[_Key, float]]] = ([], [])
    for pair in pairs:
        for side, owner, graph in zip(sides, ("base", "tuned"), pair, strict=True):
            side.append(_keyed(graph, trusted, owner))
    if not sides[0]:
        raise ValueError("pairs: expected at least one prompt, got none")
    keys = sorted({key for side in sides for prompt in side for key in prompt})
    base, tuned = (np.array([[prompt.get(key, 0.0) for key in keys] for prompt in side]) for side in sides)
    in_base, in_tuned = (
        np.array([[key in prompt for key in keys] for prompt in side]).mean(0) for side in sides
    )
    p = _sign_flip(tuned - base, flips, seed)
    columns = np.stack([base.mean(0), tuned.mean(0), p, _adjusted(p), in_base, in_tuned], 1)
    names = ("base", "tuned", "p", "q", "in_base", "in_tuned")
    found = [
        FeatureChange(feature, **dict(zip(names, row, strict=True)), trusted=owner == "both")
        for (feature, owner), row in zip(keys, columns.tolist(), strict=True)
    ]
    return sorted(found, key=lambda one: (-abs(one.change), one.feature))


def _keyed(graph: Graph, trusted: set[Feature] | None, owner: str) -> dict[_Key, float]:
    """Influence of each feature, by what it is the same as in the other model: nothing, if it was not carried over."""
    found = feature_influence(graph)
    if trusted is None:
        return {(feature, "both"): influence for feature, influence in found.items()}
    adapters = {(layer, index) for layer, _, index in graph.features[graph.from_adapter].tolist()}
    same = trusted | adapters
    return {
        (feature, "both" if feature in same else owner): influence for feature, influence in found.items()
    }


def _sign_flip(differences: Array, flips: int, seed: int) -> Array:
    """``[features]`` two-sided p-values of the mean over prompts of ``differences [prompts, features]``."""
    generator = np.random.default_rng(seed)
    observed = np.abs(differences.sum(0))
    least = observed * (1 - 1e-9)  # patterns that give the observed sum up to rounding are as far
    further = np.zeros(differences.shape[1])
    for first in range(0, flips, _FLIPS_AT_ONCE):
        signs = generator.choice([-1.0, 1.0], size=(min(_FLIPS_AT_ONCE, flips - first), len(differences)))
        further += (np.abs(signs @ differences) >= least).sum(0)
    return (further + 1) / (flips + 1)


def _adjusted(p: Array) -> Array:
    """Benjamini and Hochberg's q-values."""
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty_like(p)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return q
