"""Tokens that training from scratch needs to reach the quality of an adaptation, from the reports of real runs.

    python -m benchmarks matched OUT

OUT is a folder that ``benchmarks/walkthrough.sh`` has written: ``tcs_pat.run`` and ``tcs_scratch_*.run``.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path

Point = tuple[int, float]  # tokens processed, held-out FVU


def read(folder: Path) -> tuple[Point, float]:
    """((tokens, mean FVU on validation documents), mean L0) of one training."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return (report["tokens"], report["fvu"]), report["l0"]


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
    adapted, l0 = read(out / "tcs_pat.run")
    before = json.loads((out / "tcs_pat.run/report.json").read_text(encoding="utf-8"))["fvu_before"]
    runs = [read(folder) for folder in sorted(out.glob("tcs_scratch_*.run"))]
    if not runs:
        print(f"expected runs from scratch in {out}/tcs_scratch_*.run, found none")
        return 2
    print(f"{'run':<14}{'tokens':>12}{'FVU':>9}{'L0':>7}   (validation documents, mean over layers)")
    print(f"{'unadapted':<14}{0:>12,}{before:>9.4f}{l0:>7.1f}")
    print(f"{'PAT':<14}{adapted[0]:>12,}{adapted[1]:>9.4f}{l0:>7.1f}")
    for (tokens, fvu), l0_scratch in sorted(runs):
        print(f"{'from scratch':<14}{tokens:>12,}{fvu:>9.4f}{l0_scratch:>7.1f}")
    text, found = tokens_to_reach(adapted[1], [point for point, _ in runs])
    print(f"\nfrom scratch needs {text} tokens for the FVU that PAT has after {adapted[0]:,}", end="")
    print(f": {found / adapted[0]:.1f} times as many" if found else "")
    return 0
