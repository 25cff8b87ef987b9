"""Selection by cumulative share, without sorting what need not be sorted."""

import numpy as np

from fasttc.graph.influence import EDGES_PER_CHUNK, Array

_SORT_BELOW = 1 << 16  # fewer scores are sorted at once
_BIN_SHIFT = 44  # leading bits of a float64 that make its bin: 11 of the exponent, 8 of the mantissa


def share_threshold(scores: Array, share: float, unlisted: float = 0.0) -> float:
    """The score at which the cumulative share of the scores, in descending order, reaches ``share``.

    Args:
        scores: ``[n]`` float64, not negative.
        share: 0 to 1. At 1 it is the lowest positive score, whatever the rounding of the sum.
        unlisted: sum of scores that are not in the list and lower than the threshold.

    Returns:
        One of the scores; the lowest of them if the share is not reached, 0 if there are none or all are 0.
    """
    if not scores.size or scores.max() <= 0:
        return 0.0
    if share <= 0:
        return float(scores.max())
    if share >= 1:
        return float(scores[scores > 0].min())
    if scores.size <= _SORT_BELOW:
        return _sorted_threshold(scores, 0.0, share, None, unlisted)
    keys = scores.view(np.int64)  # the bits of a non-negative float64 are ordered like the number itself
    sums = np.zeros(1 << (63 - _BIN_SHIFT))
    for first in range(0, scores.size, EDGES_PER_CHUNK):
        part = slice(first, first + EDGES_PER_CHUNK)
        binned = np.bincount(keys[part] >> _BIN_SHIFT, scores[part])
        sums[: binned.size] += binned
    from_top = np.cumsum(sums[::-1])
    total = from_top[-1] + unlisted
    at = int(np.searchsorted(from_top / total, share))
    if at == from_top.size:  # not reached: the lowest score
        return float(scores.min())
    chosen = sums.size - 1 - at
    members = [
        scores[first : first + EDGES_PER_CHUNK][keys[first : first + EDGES_PER_CHUNK] >> _BIN_SHIFT == chosen]
        for first in range(0, scores.size, EDGES_PER_CHUNK)
    ]
    before = float(from_top[at - 1]) if at else 0.0
    return _sorted_threshold(np.concatenate(members), before, share, float(total), unlisted)


def _sorted_threshold(
    scores: Array, before: float, share: float, total: float | None, unlisted: float
) -> float:
    descending = np.sort(scores)[::-1]
    cumulative = before + np.cumsum(descending)
    if total is None:
        total = float(cumulative[-1]) + unlisted
    at = int(np.searchsorted(cumulative / total, share))
    return float(descending[min(at, descending.size - 1)])
