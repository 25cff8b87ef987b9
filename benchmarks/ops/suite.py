"""Times ops against their competitors.

    python -m benchmarks ops --op encode --shape 4096,2304,65536,64,bfloat16
    python -m benchmarks ops --op decode_backward --base main        this checkout against another commit

Results are compared with a float64 oracle first; a competitor whose result is wrong gets no time. Exits with 1 if ours
is wrong.
"""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from fasttc.benchmarks import record

from .measure import Row, measure
from .registry import REGISTRY, Problem
from .roofs import Roofs, measure_roofs

HEADER = (
    f"{'op':16s} {'competitor':14s} {'N,D,F,K,dtype':28s} {'median ms':>10s} {'p20':>9s} {'p80':>9s} "
    f"{'peak MB':>8s} {'% roof':>6s} {'x':>6s}"
)


def line(row: Row, ours: float | None) -> str:
    """One line of the table; the last column says how many times our time it took."""
    start = f"{row.op:16s} {row.competitor:14s} {row.shape:28s}"
    if row.median is None:
        return f"{start} {row.gate[:90]}"
    peak = "" if row.peak is None else f"{row.peak / 1e6:.0f}"
    times = "" if ours is None else f"{row.median / ours:.2f}"
    return (
        f"{start} {row.median:10.3f} {row.p20:9.3f} {row.p80:9.3f} {peak:>8s} {row.percent:6.1f} {times:>6s}"
    )


def run(
    names: list[str],
    problems: list[Problem],
    device: str,
    *,
    seed: int,
    budget: float,
    out: Path | None,
    only: list[str],
    roofs: Roofs | None = None,
) -> list[Row]:
    """Every op on every problem; prints as it goes and rewrites ``out`` after each, so that a kill loses one case."""
    torch.manual_seed(seed)
    roofs = roofs or measure_roofs(device, {p.dtype for p in problems})
    head = {"kind": "ops", "environment": record.environment(device, seed), "roofs": roofs.as_dict()}
    rows: list[Row] = []
    print(HEADER, flush=True)
    for name in names:
        spec = REGISTRY[name]
        chosen = [c for c in spec.competitors if not only or c in only]
        for problem in problems:
            try:
                found = measure(spec, problem, device, seed, chosen, roofs, budget)
            except torch.OutOfMemoryError:
                found = [Row(name, "all", str(problem), "missing: out of memory")]
            ours = next((row.median for row in found if row.competitor == "fasttc"), None)
            for row in found:
                print(line(row, ours), flush=True)
            rows += found
            if out is not None:
                record.write(out, head, [row.as_dict() for row in rows])
    return rows


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A throw-away checkout of ``revision``, with these benchmarks beside it: (folder to run in)/benchmarks."""
    here = record.ROOT.parent
    with tempfile.TemporaryDirectory() as folder:
        tree, runner = Path(folder) / "tree", Path(folder) / "runner"
        git = ["git", "-C", str(here), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), revision], check=True)
        try:
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(
                record.ROOT, tree / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__")
            )
            runner.symlink_to(tree)
            yield runner
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def compare(revision: str, arguments: list[str]) -> int:
    """Runs ours at ``revision`` and here, in turns, each in its own process, and prints the ratio of the medians."""
    with worktree(revision) as base, tempfile.TemporaryDirectory() as results:
        times: dict[str, dict[tuple[str, str], float]] = {"base": {}, "here": {}}
        places = {"base": base, "here": record.ROOT.parent}
        for turn in range(2):
            for which, place in places.items():
                out = Path(results) / f"{which}{turn}.json"
                command = [sys.executable, "-m", "benchmarks", "ops", "--only", "fasttc", "--out", str(out)]
                subprocess.run([*command, *arguments], cwd=place, check=True, stdout=subprocess.DEVNULL)
                for row in record.read(out)["rows"]:
                    key, value = (row["op"], row["shape"]), row["median"]
                    times[which][key] = min(value, times[which].get(key, value))
    print(f"{'op':16s} {'N,D,F,K,dtype':28s} {revision[:12]:>12s} {'here':>12s} {'speed-up':>9s}")
    for (op, shape), before in times["base"].items():
        after = times["here"][op, shape]
        print(f"{op:16s} {shape:28s} {before:12.3f} {after:12.3f} {before / after:9.2f}")
    return 0


def main(arguments: list[str]) -> int:
    parser = record.parser("ops", __doc__)
    parser.add_argument("--op", action="append", choices=REGISTRY, help="repeatable; default: all")
    parser.add_argument("--shape", action="append", help="N,D,F,K[,dtype], repeatable")
    known = sorted({name for spec in REGISTRY.values() for name in spec.competitors})
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=known,
        metavar="NAME",
        help="competitor, repeatable; default: all",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="timing budget of a case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--tiny-roofs", action="store_true", help="do not spend time on roofs (rehearsal)")
    parser.add_argument("--base", metavar="REV", help="compare ours with another commit's instead")
    options = parser.parse_args(arguments)
    if options.base:
        place = arguments.index("--base") if "--base" in arguments else -1
        rest = [
            a for i, a in enumerate(arguments) if i not in (place, place + 1) and not a.startswith("--base=")
        ]
        return compare(options.base, rest)
    warnings.filterwarnings("ignore", category=UserWarning)
    problems = [Problem.parse(text) for text in options.shape or ["2048,512,16384,32"]]
    roofs = measure_roofs(options.device, {p.dtype for p in problems}, tiny=options.tiny_roofs)
    rows = run(
        options.op or list(REGISTRY), problems, options.device, seed=options.seed, budget=options.seconds,
        out=options.out, only=options.only, roofs=roofs,
    )  # fmt: skip
    return (
        1 if any(row.competitor.startswith("fasttc") and row.gate.startswith("wrong") for row in rows) else 0
    )
