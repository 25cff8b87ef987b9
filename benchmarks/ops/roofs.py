"""What the device can do at all, measured on it: bandwidth of a copy and rate of a matrix product."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch


@dataclass(frozen=True)
class Roofs:
    """``copy``: bytes per second, read plus written; ``gemm``: FLOP/s by dtype name."""

    copy: float
    gemm: dict[str, float] = field(default_factory=dict)

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """The time below which no implementation gets at these rates."""
        return max(flops / self.gemm[dtype], moved / self.copy)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_roofs(device: str, dtypes: set[str], tiny: bool = False) -> Roofs:
    """Large copies and square products, medians of several. ``tiny``: for a rehearsal, where the figure is no use."""
    on_gpu = device.startswith("cuda")
    side = 64 if tiny else (8192 if on_gpu else 2048)
    size = 1 << (16 if tiny else (30 if on_gpu else 27))
    source, target = torch.zeros(2, size // 4, device=device).unbind()
    copy = 2 * size / _seconds(lambda: target.copy_(source), on_gpu)
    gemm = {}
    for name in sorted(dtypes):
        a, b = torch.randn(2, side, side, device=device).to(getattr(torch, name)).unbind()
        gemm[name] = 2 * side**3 / _seconds(lambda a=a, b=b: a @ b, on_gpu)
    return Roofs(copy, gemm)


def _seconds(call: Callable[[], object], on_gpu: bool, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])
