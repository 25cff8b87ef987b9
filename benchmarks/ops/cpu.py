"""A whole training step on a CPU, ours against its competitors: times in turns, memory in one process each.

    python -m benchmarks cpu                            table of the target, JSON: benchmarks/results/cpu/step.json

eai-sparsify takes part where it can be imported. Exits with 1 if ours is wrong or a target is missed.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from fasttc.benchmarks import record

from .competitors import Missing
from .measure import Elsewhere, Row, measure
from .registry import REGISTRY, Problem, draw
from .roofs import measure_roofs
from .steps import STEP_MAKERS

TARGET = Problem(2048, 512, 16384, 32)
COMPETITORS = ("fasttc", "dense", "embedding_bag", "sparsify")
TARGETS = {"dense": 2.5, "sparsify": 1.25}  # how many times our time they take, at least
MEMORY_STEPS = 3
DISTURBED = 0.1  # cores that other processes may keep busy while ours are timed


def memory_of(name: str, problem: Problem, seed: int) -> int:
    """Bytes that some steps need at most beyond what this process held before the first: weights and batch."""
    step = STEP_MAKERS[name](draw(problem, "cpu", seed), problem.k)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = record.resident("VmRSS")
    for _ in range(MEMORY_STEPS):
        step.run()
    return record.resident("VmHWM") - before


def memory_elsewhere(name: str, problem: Problem, seed: int, threads: int) -> int | None:
    """:func:`memory_of` in a process of its own; None where that fails (no /proc, competitor missing)."""
    command = [*record.COMMAND, "cpu", "--memory-of", name, "--shape", str(problem)]
    command += ["--seed", str(seed), "--threads", str(threads)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        print(f"memory of {name}: not measured: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence per target, each beginning with "met", "missed" or "open"."""
    by_name = {row["competitor"]: row for row in rows}
    ours, said = by_name["fasttc"], []
    for name, wanted in TARGETS.items():
        other = by_name.get(name)
        if other is None or other["median"] is None or ours["median"] is None:
            said.append(f"open: no time of {name}")
            continue
        reached = other["median"] / ours["median"]
        verdict = "met" if reached >= wanted else "missed"
        said.append(f"{verdict}: {reached:.2f} times as fast as {name} (at least {wanted})")
        if other["extra"] and ours["extra"]:
            share = ours["extra"] / other["extra"]
            verdict = "met" if share <= 0.5 else "missed"
            said.append(f"{verdict}: {share:.2f} of the memory of {name} (at most 0.5)")
    return said


def table(rows: list[dict[str, Any]]) -> str:
    """The figures side by side."""
    ours = next(row for row in rows if row["competitor"] == "fasttc")
    lines = [
        f"{'':14s} {'median ms':>10s} {'p20':>8s} {'p80':>8s} {'x time':>7s} {'extra MB':>9s} {'x memory':>9s}"
    ]
    for row in rows:
        if row["median"] is None:
            lines.append(f"{row['competitor']:14s} {row['gate']}")
            continue
        times = f"{row['median'] / ours['median']:.2f}" if ours["median"] else ""
        extra = f"{row['extra'] / 1e6:.0f}" if row["extra"] else ""
        memory = f"{row['extra'] / ours['extra']:.2f}" if row["extra"] and ours["extra"] else ""
        lines.append(
            f"{row['competitor']:14s} {row['median']:10.1f} {row['p20']:8.1f} {row['p80']:8.1f} {times:>7s} "
            f"{extra:>9s} {memory:>9s}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = record.parser("cpu", __doc__)
    parser.add_argument("--shape", default=str(TARGET), help="N,D,F,K[,dtype]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, all competitors together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the dense step as well")
    parser.add_argument("--out", type=Path, default=record.ROOT / "results/cpu/step.json")
    parser.add_argument("--memory-of", choices=STEP_MAKERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("expected TRITON_INTERPRET unset, got 1: it would time the interpreter")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    warnings.filterwarnings("ignore", category=UserWarning)
    problem = Problem.parse(options.shape)
    if options.memory_of:
        try:
            print(json.dumps(memory_of(options.memory_of, problem, options.seed)))
        except Missing as error:
            print(error, file=sys.stderr)
            return 3
        return 0
    names = [*COMPETITORS, *(["compiled"] if options.compiled else [])]
    head: dict[str, Any] = {"kind": "cpu", "environment": record.environment("cpu", options.seed)}
    roofs = measure_roofs("cpu", {problem.dtype})
    elsewhere = Elsewhere()
    found = measure(REGISTRY["step"], problem, "cpu", options.seed, names, roofs, options.seconds)
    head["cores elsewhere"] = elsewhere.cores()
    rows = [_with_memory(row, problem, options.seed, options.threads) for row in found]
    said = judge(rows)
    record.write(options.out, {**head, "roofs": roofs.as_dict(), "targets": said}, rows)
    print(
        f"training step, N,D,F,K,dtype = {problem}, {options.threads} threads, {head['environment']['device']}"
    )
    if (head["cores elsewhere"] or 0.0) > DISTURBED:
        said.append(
            f"disturbed: other processes kept {head['cores elsewhere']:.2f} cores busy; measure again"
        )
    print(table(rows), *said, f"written to {options.out}", sep="\n")
    return 0 if all(text.startswith("met") for text in said) else 1


def _with_memory(row: Row, problem: Problem, seed: int, threads: int) -> dict[str, Any]:
    timed = row.median is not None
    extra = memory_elsewhere(row.competitor, problem, seed, threads) if timed else None
    return {**row.as_dict(), "extra": extra}
