"""Tokens that training from scratch needs to reach the quality of an adaptation, from the reports of real runs.

    python -m benchmarks matched OUT

OUT is a folder that ``benchmarks/adaptation/walkthrough.sh`` has written: ``tcs_pat_*.run`` and ``tcs_scratch_*.run``.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

Point = tuple[int, float]  # tokens processed, held-out FVU


class Trained(NamedTuple):
    """One training: tokens processed, mean FVU and L0 on validation documents; FVU before it, of an adaptation."""

    tokens: int
    fvu: float
    l0: float
    fvu_before: float | None


def read(folder: Path) -> Trained:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Trained(*(report.get(name) for name in Trained._fields))


def tokens_to_reach(fvu: float, runs: list[Point]) -> tuple[str, float | None]:
    """Where a falling curve through ``runs`` meets ``fvu``: straight lines in log tokens and log FVU between runs.

    Returns:
        A text ("> 1,280,000" where no run is as good, "< 160,000" where all are) and the number, if there is one.
    """
    runs = sorted(runs)
    if runs[0][1] <= fvu:
        return f"< {runs[0][0]:,}", None
    for (tokens, worse), (more, better) in pairwise(runs):
        if better <= fvu:
            share = (math.log(worse) - math.log(fvu)) / (math.log(worse) - math.log(better))
            found = math.exp(math.log(tokens) + share * (math.log(more) - math.log(tokens)))
            return f"{found:,.0f}", found
    return f"> {runs[-1][0]:,}", None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks matched", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the walkthrough")
    out = parser.parse_args(arguments).out
    found = {
        kind: sorted(read(folder) for folder in out.glob(f"tcs_{kind}_*.run")) for kind in ("pat", "scratch")
    }
    if not all(found.values()):
        print(f"expected runs in {out}/tcs_pat_*.run and {out}/tcs_scratch_*.run, found {found}")
        return 2
    print(f"{'run':<14}{'tokens':>12}{'FVU':>9}{'L0':>7}   (validation documents, mean over layers)")
    print(f"{'unadapted':<14}{0:>12,}{found['pat'][0].fvu_before:>9.4f}{found['pat'][0].l0:>7.1f}")
    for kind, name in (("pat", "PAT"), ("scratch", "from scratch")):
        for run in found[kind]:
            print(f"{name:<14}{run.tokens:>12,}{run.fvu:>9.4f}{run.l0:>7.1f}")
    print()
    for run in found["pat"]:
        text, needed = tokens_to_reach(run.fvu, [(other.tokens, other.fvu) for other in found["scratch"]])
        times = f": {needed / run.tokens:.1f} times as many" if needed else ""
        print(
            f"from scratch needs {text} tokens for the FVU {run.fvu:.4f} that PAT has after {run.tokens:,}{times}"
        )
    return 0
