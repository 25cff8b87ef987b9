"""Which targets go down together: cohorts that fit the memory, waste little and keep the matrix products large."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fasttc.attribution.beside import MlpPath
from fasttc.attribution.linearize import LinearModel
from fasttc.attribution.sources import Sources

# Size of a cohort's gradient [P, n, D]: on the CPU it should stay in the last-level cache, on a GPU fill the device.
_PREFERRED_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
_SMALL = 2048  # cohorts of fewer (target, position) pairs are not split to save padding


@dataclass(frozen=True)
class Point:
    """Where gradients of targets enter the residual stream.

    Attributes:
        depth: their sources lie in the layers below this one.
        attention_first: they enter between the attention and the MLP of layer ``depth``, so that they pass its
            attention first; otherwise at the layer's input.
    """

    depth: int
    attention_first: bool


@dataclass(frozen=True)
class Budget:
    """Memory of the sweep.

    Attributes:
        limit: bytes that the working set of one cohort may take at most.
        preferred: bytes of gradient at which larger cohorts stop being faster.
        rows: bytes of rows that wait beside it while features are ranked; None for any number.
    """

    limit: int
    preferred: int
    rows: int | None = None


def make_budget(limit: int | None, device: torch.device) -> Budget:
    """The budget for a limit in bytes; without one, a quarter of a GPU's free memory, or 1 GiB on the CPU.

    Rows that wait may take as much again, and as much as they need on the CPU without a limit.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"memory_budget: expected a positive number of bytes or None, got {limit!r}")
    rows = limit
    if limit is None and device.type == "cuda":
        limit = rows = torch.cuda.mem_get_info(device)[0] // 4
    return Budget(limit or 1 << 30, _PREFERRED_BYTES.get(device.type, _PREFERRED_BYTES["cpu"]), rows)


def check_budget(budget: Budget, model: LinearModel, sources: Sources) -> None:
    """ValueError, saying how much is needed, where ``budget`` does not hold one target of the largest kind."""
    needed = bytes_per_target(model, sources, sources.n_layers, sources.n_tokens)
    if budget.limit < needed:
        raise ValueError(
            f"memory_budget: expected at least {needed} bytes, for one target that reaches {sources.n_tokens} "
            f"positions, got {budget.limit}"
        )


def bytes_per_target(model: LinearModel, sources: Sources, depth: int, length: int) -> int:
    """Bytes of the working set per target of a cohort of the given depth that reaches ``length`` positions."""
    layer = model.layers[0]
    width, head_dim = sources.embedding.shape[1], layer.head_dim
    rank = max(1 + layer.n_heads, length)  # factors: old and new ones side by side, and their coefficients
    gradient = length * width * (2 if any(one.skip is not None or one.write for one in model.layers) else 1)
    hidden = max((one.skip.hidden for one in model.layers if isinstance(one.skip, MlpPath)), default=0)
    attention = length * head_dim * (1 + layer.n_kv_heads)
    factors = 2 * rank * (width + length)
    # The row itself, and the features of one layer once more before they are copied into it.
    row = 2 * sources.width(depth, length)
    dense_mlp = 2 * length * (hidden + width) if hidden else 0
    return (gradient + attention + factors + row + dense_mlp) * sources.embedding.element_size()


def cohorts(
    positions: Sequence[int], n_channels: int, item_size: int, cost: Callable[[int], int], budget: Budget
) -> Iterator[tuple[int, int]]:
    """Splits targets of one point, ordered by position, into ranges ``(start, stop)``; ascending.

    Args:
        positions: of the targets, ascending.
        n_channels: D.
        item_size: bytes per number.
        cost: bytes of the working set per target, given the number of positions its cohort reaches.
        budget: what a cohort may take; at least one target of each length.
    """
    ranges = []
    stop = len(positions)
    while stop > 0:
        length = positions[stop - 1] + 1
        most = min(budget.limit // cost(length), budget.preferred // (length * n_channels * item_size))
        start = max(0, stop - max(1, most))
        if (stop - start) * length > _SMALL:
            # Targets at less than half the length would spend most of their work on positions after their own.
            start = max(start, bisect_left(positions, length // 2, start, stop - 1))
        ranges.append((start, stop))
        stop = start
    return reversed(ranges)
