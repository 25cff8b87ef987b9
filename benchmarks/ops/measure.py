"""How it is measured: competitors take turns, caches are cold, wrong results are not timed."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttc.testing import assert_within_budget

from .competitors import Missing, Run
from .registry import OpSpec, Problem, draw
from .roofs import Roofs

GATE_ROWS = 64  # tokens of the problem on which the gate compares: float64 is slow
FLUSH_BYTES = 256 << 20  # written before every timed call on a GPU: more than any L2 cache


class Wrong(Exception):
    """A result that the oracle contradicts."""


@dataclass(frozen=True)
class Row:
    """One competitor on one problem. Times in milliseconds, memory in bytes; None where not measured.

    Attributes:
        op, competitor, shape: what was run; shape as ``N,D,F,K,dtype``.
        gate: "passed", "nothing to compare", "missing: why" or "wrong: why".
        rounds: timed calls.
        median, p20, p80: of their times.
        peak: bytes allocated at most during a call beyond what was allocated before (GPU only).
        flops, bytes: that cannot be avoided.
        roof: milliseconds these take at the measured rates of the device; percent: roof / median.
    """

    op: str
    competitor: str
    shape: str
    gate: str
    rounds: int = 0
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    peak: int | None = None
    flops: float | None = None
    bytes: float | None = None
    roof: float | None = None
    percent: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantile(times: list[float], share: float) -> float:
    """Linear between order statistics."""
    ordered = sorted(times)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def check(
    spec: OpSpec, name: str, run: Run, expected: dict[str, Tensor], eager: dict[str, Tensor], eps: float
) -> str:
    """Compares a run's outputs with the oracle: at most twice as wrong as eager PyTorch in the same dtype.

    Args:
        eager: the outputs of dense eager PyTorch.
        eps: relative rounding of the problem's dtype; four of them are allowed on top, because gradients pass
            through several roundings.

    Raises:
        Wrong: an output is missing, is not finite or is further off than that.
    """
    outputs = run.outputs()
    if not outputs:
        return "nothing to compare"
    if outputs.keys() != expected.keys():
        raise Wrong(f"{spec.name} of {name}: expected outputs {sorted(expected)}, got {sorted(outputs)}")
    for key, oracle in expected.items():
        same = (outputs[key].detach().double(), oracle, eager[key].detach().double())
        try:
            assert_within_budget(*same, eps=4 * eps, name=f"{spec.name} of {name}, {key}")
        except AssertionError as error:
            raise Wrong(str(error)) from error
    return "passed"


def rounds_for(seconds_per_round: float, budget: float, most: int = 50) -> int:
    """As many rounds as fit in the budget, at least 3."""
    return max(3, min(most, int(budget / max(seconds_per_round, 1e-9))))


def interleaved(calls: dict[str, Callable[[], object]], device: str, budget: float) -> dict[str, list[float]]:
    """Milliseconds of every call, the competitors taking turns; one untimed call each comes first."""
    clock = _gpu_clock(device) if device.startswith("cuda") else _cpu_clock
    for call in calls.values():
        clock(call)
    first = {name: clock(call) for name, call in calls.items()}
    times = {name: [value] for name, value in first.items()}
    for _ in range(rounds_for(sum(first.values()) / 1e3, budget) - 1):
        for name, call in calls.items():
            times[name].append(clock(call))
    return times


def _cpu_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _gpu_clock(device: str) -> Callable[[Callable[[], object]], float]:
    """Flushes the L2 cache, which also leaves the GPU busy while the call's launches are queued."""
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(call: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    return clock


class Elsewhere:
    """How many cores other processes keep busy from its making on: what times on a CPU must be read with."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        """Their mean number; None where /proc/stat does not exist."""
        (clock, seconds), (before, used) = self._now(), self._start
        return None if seconds is None or used is None else max(seconds - used, 0.0) / (clock - before)

    @staticmethod
    def _now() -> tuple[float, float | None]:
        """Wall clock, and the CPU seconds of all processes but this one."""
        try:
            words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        except OSError:
            return time.perf_counter(), None
        user, nice, system, _idle, _wait, irq, softirq, stolen = map(int, words[1:9])
        busy = (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - time.process_time()


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Allocated at most during a call beyond what was allocated before, on a GPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gate(spec: OpSpec, problem: Problem, device: str, seed: int, names: list[str]) -> dict[str, str]:
    """A verdict for every competitor, from the problem with its first tokens only."""
    small = Problem(min(problem.n, GATE_ROWS), problem.d, problem.f, problem.k, problem.dtype)
    inputs = draw(small, device, seed)
    expected = spec.oracle(inputs, problem.k)
    eager = spec.competitors["dense"](inputs, problem.k).outputs()
    eps = torch.finfo(problem.torch_dtype).eps
    verdicts = {}
    for name in names:
        try:
            verdicts[name] = check(
                spec, name, spec.competitors[name](inputs, problem.k), expected, eager, eps
            )
        except Missing as error:
            verdicts[name] = f"missing: {error}"
        except Wrong as error:
            verdicts[name] = f"wrong: {error}"
    return verdicts


def measure(
    spec: OpSpec, problem: Problem, device: str, seed: int, names: list[str], roofs: Roofs, budget: float
) -> list[Row]:
    """Rows of one op on one problem: gate, then time those that passed, taking turns.

    Args:
        names: competitors, a subset of ``spec.competitors``.
        roofs: measured rates of the device.
        budget: seconds of timing for all of them together.
    """
    verdicts = gate(spec, problem, device, seed, names)
    inputs = draw(problem, device, seed)
    work = spec.work(problem)
    roof = 1e3 * roofs.seconds(work.flops, work.bytes, problem.dtype)
    calls = {
        name: spec.competitors[name](inputs, problem.k).call
        for name in names
        if verdicts[name] in ("passed", "nothing to compare")
    }
    times = interleaved(calls, device, budget) if calls else {}
    rows = []
    for name in names:
        if name not in calls:
            rows.append(Row(spec.name, name, str(problem), verdicts[name]))
            continue
        median = quantile(times[name], 0.5)
        rows.append(
            Row(
                spec.name, name, str(problem), verdicts[name], len(times[name]), median,
                quantile(times[name], 0.2), quantile(times[name], 0.8), peak_bytes(calls[name], device),
                work.flops, work.bytes, roof, 100 * roof / median,
            )
        )  # fmt: skip
    return rows
