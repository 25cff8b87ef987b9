"""Compiles every kernel ahead of time for every architecture and checks what the kernels promise. Needs no GPU.

    python -m benchmarks aot                                    every width and target: minutes
    python -m benchmarks aot --d 2304 --targets sm_90,gfx942    one width, two targets

Exits non-zero unless, for each kernel: it compiles, nothing spills to memory, its shared memory fits the chip, and the
128-bit loads and matrix instructions that its case promises are in the machine code. Prints a table and writes it as
JSON to ``benchmarks/results/aot/`` (``--out``).
"""

import argparse
import json
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from fasttc import kernels
from fasttc.benchmarks import record
from fasttc.kernels._launch import ARCHITECTURES, AotCase

from .aot_inspect import Footprint, identity, inspect

WIDTHS = (2304, 3584, 2305)
RESULTS = record.ROOT / "results/aot"


@dataclass
class Row:
    """One kernel, at one width, on one architecture; ``footprint`` is None where it did not compile."""

    module: str
    case: str
    d: int
    target: str
    config: str
    footprint: Footprint | None
    error: str = ""

    @property
    def failures(self) -> list[str]:
        return [self.error] if self.footprint is None else self.footprint.failures


def modules() -> list[str]:
    """Kernel modules: every file of the folder without a leading underscore that exposes ``aot_cases``."""
    files = sorted(Path(next(iter(kernels.__path__))).glob("[a-z]*.py"))
    return [path.stem for path in files if hasattr(import_module(f"fasttc.kernels.{path.stem}"), "aot_cases")]


def cases_of(module: str, d: int) -> dict[str, AotCase]:
    found = {case.name: case for case in import_module(f"fasttc.kernels.{module}").aot_cases(d)}
    if not found:
        raise ValueError(f"kernels/{module}.py: expected aot_cases({d}) to name cases, got none")
    return found


def compile_row(job: tuple[str, str, int, str]) -> Row:
    """Compiles and checks one case: runs in a worker process, so it takes names and returns plain data."""
    module, name, d, target = job
    case = cases_of(module, d)[name]
    row = Row(module, name, d, target, str(case.configs[target]), None)
    try:
        row.footprint = inspect(case, target)
    except Exception as error:
        row.error = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        )
        if os.environ.get("FASTTC_AOT_TRACEBACK"):
            traceback.print_exc()
    return row


def plan(widths: list[int], targets: list[str], only: str) -> tuple[list[tuple], dict[tuple, tuple]]:
    """Jobs (module, case, d, target), and for each the first job that compiles to the same code."""
    jobs, first, same = [], {}, {}
    for module in modules():
        for d in widths:
            for name, case in cases_of(module, d).items():
                for target in case.targets:
                    if target not in targets or only not in f"{module}: {name}":
                        continue
                    job = (module, name, d, target)
                    jobs.append(job)
                    same[job] = first.setdefault(identity(case, target), job)
    return jobs, same


def run(widths: list[int], targets: list[str], only: str = "", workers: int = 1) -> list[Row]:
    """Every case at every width and target, each distinct code compiled once."""
    jobs, same = plan(widths, targets, only)
    distinct = sorted(set(same.values()), key=jobs.index)
    if workers == 1:
        rows = map(compile_row, distinct)
    else:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        rows = pool.map(compile_row, distinct)
    done = {}
    for job, row in zip(distinct, rows, strict=True):
        done[job] = row
        print(line(row), flush=True)
    return [
        Row(*job, done[same[job]].config, done[same[job]].footprint, done[same[job]].error) for job in jobs
    ]


HEADER = (
    f"{'kernel':44s} {'d':>5s} {'target':7s} {'regs':>4s} {'spills':>6s} {'shared':>7s} {'instr':>6s} "
    "128b mma  verdict"
)


def line(row: Row) -> str:
    """One line of the table."""
    start = f"{row.module + ': ' + row.case:44s} {row.d:5d} {row.target:7s}"
    if row.footprint is None:
        return f"{start} FAILS: {row.error}"
    f = row.footprint
    verdict = "FAILS: " + "; ".join(f.failures) if f.failures else "ok"
    wide, matrix = ("yes" if f.wide_loads else "no"), ("yes" if f.matrix_unit else "no")
    return f"{start} {f.registers:4d} {f.spills:6d} {f.shared:7d} {f.instructions:6d} {wide:4s} {matrix:4s} {verdict}"


def write(rows: list[Row], out: Path) -> Path:
    """The table as JSON: one object per compiled code, whose ``d`` lists the widths that share it."""
    codes: dict[str, dict[str, Any]] = {}
    for row in rows:
        code = {"module": row.module, "case": row.case, "target": row.target, "config": row.config}
        code |= {"error": row.error} if row.footprint is None else asdict(row.footprint)
        codes.setdefault(json.dumps(code), {**code, "d": []})["d"].append(row.d)
    path = out / f"triton-{triton.__version__}.json"
    head = {"kind": "aot", "triton": triton.__version__, "torch": torch.__version__.split("+")[0]}
    record.write(path, head, list(codes.values()))
    return path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks aot", description=__doc__.splitlines()[0])
    parser.add_argument("--d", default=",".join(map(str, WIDTHS)), help="model widths, comma-separated")
    parser.add_argument("--targets", default=",".join(ARCHITECTURES), help="architectures, comma-separated")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose module and name hold TEXT"
    )
    parser.add_argument("--workers", type=int, default=1, help="compiler processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(
            "aot: expected TRITON_INTERPRET unset, got 1: interpreted kernels cannot be compiled",
            file=sys.stderr,
        )
        return 2
    targets = options.targets.split(",")
    unknown = [name for name in targets if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"--targets: expected some of {','.join(ARCHITECTURES)}, got {','.join(unknown)}")
    print(HEADER)
    rows = run([int(d) for d in options.d.split(",")], targets, options.only, options.workers)
    failed = [row for row in rows if row.failures]
    print(f"\n{len(rows)} rows, {len(failed)} fail")
    for row in failed:
        print(line(row))
    if not options.no_write:
        print(f"written to {write(rows, options.out)}")
    return 1 if failed or not rows else 0
