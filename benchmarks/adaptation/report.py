"""Reads the runs of the adaptation ledger; writes their JSON, the tables, worst first, and the plot."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasttc.benchmarks import record

from .matched import tokens_to_reach
from .runs import ADAPTING, MODES

LEVELS = {  # distance -> FVU at which tokens are compared, by coverage; set before anything was measured here
    ("covered", "mild"): (0.12,),
    ("covered", "severe"): (0.11,),
    ("uncovered", "severe"): (0.13,),
    ("uncovered", "mild"): (0.13,),
}
AT_SCRATCH = (163_840, 655_360, 1_310_720)
"""Budgets of training from scratch whose FVU is asked of the adaptations."""
Row = dict[str, Any]


class Bound(NamedTuple):
    """A number that is known, or only that it is below ("<") or above (">") one."""

    sign: str
    value: float

    def __str__(self) -> str:
        return f"{'' if self.sign == '=' else self.sign + ' '}{self.value:,.0f}"


def reach(fvu: float, runs: Sequence[Row]) -> Bound:
    """Tokens at which the curve of ``runs`` meets ``fvu``."""
    points = [(row["tokens"], row["fvu"]) for row in runs]
    _, found = tokens_to_reach(fvu, points)
    if found is not None:
        return Bound("=", found)
    least = min(points)
    if least[1] == fvu:
        return Bound("=", least[0])
    return Bound("<", least[0]) if least[1] < fvu else Bound(">", max(points)[0])


def ratio(scratch: Bound, adapted: Bound) -> Bound:
    """How many times the tokens; a bound where one of them is."""
    value = scratch.value / adapted.value
    signs = {scratch.sign, {"<": ">", ">": "<", "=": "="}[adapted.sign]} - {"="}
    return Bound("=" if not signs else signs.pop() if len(signs) == 1 else "?", value)


def _cells(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(coverage, distance, quality) of every cell."""
    return sorted({(row["coverage"], row["distance"], row["quality"]) for row in rows if row["coverage"]})


def comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For every cell, level, adapting mode and seed: tokens of both sides and their ratio; worst first."""
    found = []
    for coverage, distance, quality in _cells(rows):
        for seed in sorted({row["seed"] for row in rows}):
            of_seed = [row for row in rows if row["seed"] == seed and row["distance"] == distance]
            scratch = [row for row in of_seed if row["mode"] == "scratch"]
            if not scratch:
                continue
            levels = [(f"FVU {level:g}", level) for level in LEVELS[coverage, distance]]
            levels += [
                (f"scratch at {b:,}", r["fvu"]) for b in AT_SCRATCH for r in scratch if r["budget"] == b
            ]
            for name, level in levels:
                for mode in ADAPTING:
                    runs = [
                        r
                        for r in of_seed
                        if (r["mode"], r["coverage"], r["quality"]) == (mode, coverage, quality)
                    ]
                    if not runs:
                        continue
                    sides = reach(level, scratch), reach(level, runs)
                    found.append(
                        {"coverage": coverage, "distance": distance, "quality": quality, "level": name, "fvu": level,
                         "mode": mode, "seed": seed, "scratch": sides[0], "adapted": sides[1], "ratio": ratio(*sides)}
                    )  # fmt: skip
    return found


def _spread(bounds: Sequence[Bound]) -> str:
    """The median, and all seeds from least to greatest."""
    ordered = sorted(bounds, key=lambda bound: bound.value)
    middle = ordered[(len(ordered) - 1) // 2]
    inside = "" if len(ordered) == 1 else f" ({ordered[0]} … {ordered[-1]})"
    return f"{middle}{inside}"


def _times(bounds: Sequence[Bound]) -> str:
    ordered = sorted(bounds, key=lambda bound: bound.value)
    texts = [f"{b.sign if b.sign != '=' else ''} {_short(b.value)} ×".strip() for b in ordered]
    inside = "" if len(texts) == 1 else f" ({texts[0]} … {texts[-1]})"
    return f"{texts[(len(texts) - 1) // 2]}{inside}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def ratio_table(
    found: Sequence[dict[str, Any]], mode: str = "closed form + PAT", quality: str | None = None
) -> str:
    """Markdown: how many times the tokens training from scratch takes, a line per cell and level, worst first."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found:
        if row["mode"] == mode and quality in (None, row["quality"]):
            name = row["level"]
            groups.setdefault((row["coverage"], row["distance"], row["quality"], name), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: statistics.median(r["ratio"].value for r in item[1]))
    lines = [
        "| base saw such text | fine-tuning | base | compared at | scratch, tokens | adapted, tokens | ratio |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for (coverage, distance, quality_, level), rows in ordered:
        saw = {"covered": "yes", "uncovered": "no"}[coverage]
        sides = (_spread([r[side] for r in rows]) for side in ("scratch", "adapted"))
        cells = [saw, distance, quality_, level, *sides, _times([r["ratio"] for r in rows])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curve_table(rows: Sequence[Row], distance: str, coverage: str, quality: str) -> str:
    """Markdown: what every mode reaches after how many tokens, the mean over seeds with least and greatest FVU."""
    lines = [
        "| mode | tokens | FVU | KL | top-1 error | CE replaced | L0 | CPU s | GFLOP | peak MB | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for mode in MODES:
        here = [
            r for r in rows
            if r["mode"] == mode and r["distance"] == distance
            and (mode == "scratch" or (r["coverage"], r["quality"]) == (coverage, quality))
        ]  # fmt: skip
        for budget in sorted({r["budget"] for r in here}):
            same = [r for r in here if r["budget"] == budget]
            fvu = [r["fvu"] for r in same]
            spread = f"{_mean(same, 'fvu'):.4f} ({min(fvu):.4f} … {max(fvu):.4f})"
            costs = ["", "", ""]
            if mode != "unadapted":
                costs = [
                    f"{_mean(same, 'cpu_seconds'):.1f}",
                    f"{_mean(same, 'flops') / 1e9:.0f}",
                    f"{_mean(same, 'peak_bytes') / 1e6:.0f}",
                ]
            cells = [
                mode, f"{_mean(same, 'tokens'):,.0f}" if mode != "unadapted" else "0", spread,
                f"{_mean(same, 'kl'):.3f}", f"{100 * _mean(same, 'top1_error'):.1f} %",
                f"{_mean(same, 'ce_replaced'):.3f}", f"{_mean(same, 'l0'):.1f}", *costs, str(len(same)),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def plot(rows: Sequence[Row], path: Path) -> None:
    """FVU against tokens, a panel per cell; every seed a point, lines through their means."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fasttc"
    cells = _cells(rows)
    if not cells:
        return  # only scratch so far
    columns = min(4, len(cells))
    height = math.ceil(len(cells) / columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(3.6 * columns, 3.2 * height), sharey=True, squeeze=False
    )
    for axis, (coverage, distance, quality) in zip(axes.flat, cells, strict=False):
        for mode, colour in zip(MODES[1:], ("C7", "C1", "C2", "C0"), strict=True):
            here = [
                r for r in rows
                if r["mode"] == mode and r["distance"] == distance
                and (mode == "scratch" or (r["coverage"], r["quality"]) == (coverage, quality))
            ]  # fmt: skip
            axis.plot([r["tokens"] for r in here], [r["fvu"] for r in here], ".", color=colour, markersize=3)
            means = [[r for r in here if r["budget"] == b] for b in sorted({r["budget"] for r in here})]
            x, y = ([_mean(same, name) for same in means] for name in ("tokens", "fvu"))
            axis.plot(x, y, color=colour, label=mode, linewidth=1.2)
        start = [r["fvu"] for r in rows if (r["mode"], r["distance"], r["coverage"], r["quality"])
                 == ("unadapted", distance, coverage, quality)]  # fmt: skip
        for value in start:
            axis.axhline(value, color="black", linewidth=0.6, linestyle=":")
        axis.set(xscale="log", yscale="log", title=f"{coverage}, {distance}, base {quality}")
        axis.title.set_fontsize(8)
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
    axes[0][0].set_ylabel("FVU on test documents")
    for axis in axes[-1]:
        axis.set_xlabel("tokens processed")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def readme(data: dict[str, Any]) -> str:
    """The README's table: the fixed cells, worst first, all levels."""
    return ratio_table(comparisons(data["rows"]), quality=data["headline_quality"])


def tables(data: dict[str, Any]) -> str:
    """All tables as one Markdown text."""
    rows, found = data["rows"], comparisons(data["rows"])
    parts = [
        "# The adaptation ledger",
        data["reading"],
        "## Tokens from scratch for what an adaptation reaches",
        "",
    ]
    for mode in reversed(ADAPTING):
        parts += [f"### {mode}", "", ratio_table(found, mode), ""]
    for coverage, distance, quality in sorted(
        {(r["coverage"], r["distance"], r["quality"]) for r in rows if r["coverage"]}
    ):
        parts += [
            f"## {coverage}, {distance}, base {quality}",
            "",
            curve_table(rows, distance, coverage, quality),
            "",
        ]
    return "\n".join(parts)


READING = (
    "Tokens are tokens processed, repeats counted. Every line is its own run with its own annealed schedule; options "
    "were chosen on validation documents, figures are of test documents. The ratio is the median over seeds, with the "
    "least and the greatest; < and > where a curve does not reach that far. CPU seconds: of the process, the model's "
    "forward counted once per token at its measured cost. All transcoders are TopK with the same k."
)


def write(units: Path, results: Path, quality: str = "long") -> int:
    """JSON, tables and plot of all runs in a folder; 1 when there are none."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(units.glob("*.json"))]
    rows = [row for row in contents if "fvu" in row]
    if not rows:
        print(f"expected runs in {units}, found none")
        return 1
    searches = [row for row in contents if "tried" in row]
    head = {
        "kind": "adaptation", "environment": record.environment("cpu", 0), "reading": READING,
        "headline_quality": quality, "searches": searches,
    }  # fmt: skip
    record.write(results / "ledger.json", head, rows)
    data = record.read(results / "ledger.json")
    (results / "ledger.md").write_text(tables(data) + "\n", encoding="utf-8")
    try:
        plot(rows, results / "ledger.svg")
    except ImportError:
        print("no plot: pip install 'fasttc[bench]'")
    print(readme(data))
    print(f"\n{len(rows)} runs; written to {results}")
    return 0
