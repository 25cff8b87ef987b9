"""Selection by cumulative share, without sorting what need not be sorted."""

import numpy as np

from fasttc.graph.influence import EDGES_PER_CHUNK, Array

_SORT_BELOW = 1 << 16  # fewer scores are sorted at once
_BIN_SHIFT = 44  # leading bits of a float64 that make its bin: 11 of the exponent, 8 of the mantissa


def share_threshold(scores: Array, share: float) -> float:
    """The score at which the cumulative share of the scores, in descending order, reaches ``share``.

    Many scores are not sorted but binned by their leading bits; only the bin that holds the answer is sorted.

    Args:
        scores: ``[n]`` float64, not negative.
        share: 0 to 1. At 1 it is the lowest positive score, whatever the rounding of the sum.

    Returns:
        One of the scores; 0 if there are none or all are 0.
    """
    if not scores.size or scores.max() <= 0:
        return 0.0
    if share <= 0:
        return float(scores.max())
    if share >= 1:
        return float(scores[scores > 0].min())
    if scores.size <= _SORT_BELOW:
        return _sorted_threshold(scores, 0.0, share, None)
    keys = scores.view(np.int64)  # the bits of a non-negative float64 are ordered like the number itself
    sums = np.zeros(1 << (63 - _BIN_SHIFT))
    parts = [slice(first, first + EDGES_PER_CHUNK) for first in range(0, scores.size, EDGES_PER_CHUNK)]
    for part in parts:
        binned = np.bincount(keys[part] >> _BIN_SHIFT, scores[part])
        sums[: binned.size] += binned
    from_top = np.cumsum(sums[::-1])
    total = float(from_top[-1])
    at = int(np.searchsorted(from_top / total, share))
    chosen = sums.size - 1 - at
    members = [scores[part][keys[part] >> _BIN_SHIFT == chosen] for part in parts]
    before = float(from_top[at - 1]) if at else 0.0
    return _sorted_threshold(np.concatenate(members), before, share, total)


def _sorted_threshold(scores: Array, before: float, share: float, total: float | None) -> float:
    descending = np.sort(scores)[::-1]
    cumulative = before + np.cumsum(descending)
    at = int(np.searchsorted(cumulative / (cumulative[-1] if total is None else total), share))
    return float(descending[min(at, descending.size - 1)])
