"""Attribution against circuit-tracer's algorithm, and how it scales: tables, JSON and a plot.

    python -m benchmarks attribution                    all CPU parts, about 6 minutes on one thread
    python -m benchmarks attribution --part versus      one part: versus, scaling, long, accuracy
    python -m benchmarks attribution --tiny             all parts on a toy case, in seconds: does it run?
    python -m benchmarks attribution gpu --help         the GPU part

Everything is measured in a process of its own. Exits with 1 if a target is missed.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from fasttc.benchmarks import record

from . import case
from .judge import judge, table
from .tasks import TASKS

PARTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "versus": [
        ("ours", {"tokens": 48, "rounds": 5}),
        ("replicated", {"tokens": 48, "batch": 64}),
        ("replicated", {"tokens": 48, "batch": 256}),
        ("prune", {"rounds": 5}),
        ("prune_dense", {}),
    ],
    "scaling": [
        ("tokens_scaling", {"tokens": [24, 48, 96], "rounds": 5}),
        ("features_scaling", {"features": [2048, 4096, 8192, 16384], "tokens": 48, "rounds": 5}),
        ("targets_scaling", {"tokens": [128, 256, 512, 1024], "targets": 512, "rounds": 3}),
    ],
    "long": [
        ("long_prompt", {"tokens": 1024, "targets": 2000}),
        ("long_prompt", {"tokens": 2048, "targets": 2000}),
    ],
    "accuracy": [("accuracy", {"tokens": 48})],
}
TINY = {"tokens": 12, "batch": 16, "rounds": 1, "targets": 20}
TINY_SHAPE = case.Shape(
    layers=2,
    width=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    mlp=48,
    vocabulary=64,
    features=64,
    active=6,
    context=64,
)


def tiny(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a task, for a toy case."""
    small = {name: TINY.get(name, value) for name, value in arguments.items()}
    lists = {"tokens": [6, 12], "features": [32, 64]}
    return small | {name: lists[name] for name, value in arguments.items() if isinstance(value, list)}


def in_process(task: str, arguments: dict[str, Any], folder: Path, threads: int) -> dict[str, Any]:
    """A task in a process of its own: its name, arguments and results."""
    command = [*record.COMMAND, "attribution", "task", task]
    command += ["--folder", str(folder), "--threads", str(threads), "--arguments", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{task} {arguments}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return {"task": task, **arguments, **json.loads(done.stdout.splitlines()[-1])}


def run_task(words: list[str]) -> int:
    """What a measuring process does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks attribution task")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--arguments", type=json.loads, default={})
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    print(json.dumps(TASKS[options.task](options.folder, **options.arguments)))
    return 0


def main(words: list[str]) -> int:
    if words[:1] == ["task"]:
        return run_task(words[1:])
    if words[:1] == ["gpu"]:
        from . import gpu

        return gpu.main(words[1:])
    parser = record.parser("attribution", __doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a toy case: only to see that everything runs")
    parser.add_argument("--out", type=Path, default=record.ROOT / "results/cpu/attribution.json")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        case.save(Path(folder), TINY_SHAPE if options.tiny else case.Shape(), options.seed)
        for part in options.part or PARTS:
            for task, arguments in PARTS[part]:
                arguments = tiny(arguments) if options.tiny else arguments
                rows.append(in_process(task, arguments, Path(folder), options.threads))
                print(json.dumps(rows[-1]), flush=True)
    verdicts = judge(rows)
    head = {
        "kind": "attribution",
        "environment": record.environment("cpu", options.seed),
        "targets": verdicts,
    }
    record.write(options.out, head, rows)
    print(table(verdicts), f"written to {options.out}", sep="\n")
    _plot(rows, options.out.with_suffix(".svg"))
    return 0 if all(verdict["met"] for verdict in verdicts) else 1


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    try:
        from .plot import plot
    except ImportError:
        print("no plot: expected matplotlib (pip install 'fasttc[bench]'), found none")
        return
    if plot(rows, path):
        print(f"plot in {path}")
