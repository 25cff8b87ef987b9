"""Reads the runs of the adaptation ledger; writes their JSON, the tables, worst first, and the plots."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasttc.benchmarks import record
from fasttc.training.closed_form import HELD_OUT_TOKENS

from .curves import QUALITY, of_cell, plot
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
MEASURED_AT = (40_960, 163_840, 655_360)
"""Budgets of training from scratch whose other figures are asked of the adaptations, too."""
HEADLINE = "closed form + PAT"
PLOTS = {  # file name -> what is drawn: (cost, quality)
    "ledger": [("tokens", quality) for quality in QUALITY],
    "ledger_costs": [(cost, "fvu") for cost in ("cpu_seconds", "flops", "peak_bytes")],
}
Row = dict[str, Any]


class Bound(NamedTuple):
    """A number that is known, or only that it is below ("<") or above (">") one."""

    sign: str
    value: float

    def __str__(self) -> str:
        return f"{'' if self.sign == '=' else self.sign + ' '}{self.value:,.0f}"


def reach(level: float, runs: Sequence[Row], measure: str = "fvu") -> Bound:
    """Tokens at which the curve of ``runs`` meets ``level``."""
    points = [(row["tokens"], row[measure]) for row in runs]
    _, found = tokens_to_reach(level, points)
    if found is not None:
        return Bound("=", found)
    least = min(points)
    if least[1] == level:
        return Bound("=", least[0])
    return Bound("<", least[0]) if least[1] < level else Bound(">", max(points)[0])


def ratio(scratch: Bound, adapted: Bound) -> Bound:
    """How many times the tokens; a bound where one of them is."""
    value = scratch.value / adapted.value
    signs = {scratch.sign, {"<": ">", ">": "<", "=": "="}[adapted.sign]} - {"="}
    return Bound("=" if not signs else signs.pop() if len(signs) == 1 else "?", value)


def _cells(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(coverage, distance, quality) of every cell."""
    return sorted({(row["coverage"], row["distance"], row["quality"]) for row in rows if row["coverage"]})


def comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For every cell, level, adapting mode and seed: tokens of both sides and their ratio.

    ``counted`` is the ratio with the held-out tokens that both sides read on top.
    """
    found = []
    for coverage, distance, quality in _cells(rows):
        for seed in sorted({row["seed"] for row in rows}):
            of_seed = [row for row in rows if row["seed"] == seed]
            scratch = of_cell(of_seed, "scratch", coverage, distance, quality)
            for mode in ADAPTING if scratch else ():
                runs = of_cell(of_seed, mode, coverage, distance, quality)
                for name, measure, level in _levels(coverage, distance, scratch) if runs else ():
                    sides = [reach(level, side, measure) for side in (scratch, runs)]
                    counted = ratio(*(Bound(side.sign, side.value + HELD_OUT_TOKENS) for side in sides))
                    found.append(
                        {"coverage": coverage, "distance": distance, "quality": quality, "level": name,
                         "measure": measure, "mode": mode, "seed": seed, "scratch": sides[0], "adapted": sides[1],
                         "ratio": ratio(*sides), "counted": counted}
                    )  # fmt: skip
    return found


def _levels(coverage: str, distance: str, scratch: Sequence[Row]) -> Iterator[tuple[str, str, float]]:
    """(name, measure, value) of all that is compared in a cell."""
    for level in LEVELS[coverage, distance]:
        yield f"FVU {level:g}", "fvu", level
    for measure in QUALITY:
        for row in scratch:
            if row["budget"] in (AT_SCRATCH if measure == "fvu" else ()) + MEASURED_AT:
                yield f"scratch at {row['budget']:,}", measure, row[measure]


def _spread(bounds: Sequence[Bound]) -> str:
    """The median, and all seeds from least to greatest."""
    ordered = sorted(bounds, key=lambda bound: bound.value)
    middle = ordered[(len(ordered) - 1) // 2]
    inside = "" if len(ordered) == 1 else f" ({ordered[0]} … {ordered[-1]})"
    return f"{middle}{inside}"


def _times(bounds: Sequence[Bound]) -> str:
    ordered = sorted(bounds, key=lambda bound: bound.value)
    texts = [f"{b.sign if b.sign != '=' else ''} {_short(b.value)} ×".strip() for b in ordered]
    inside = "" if texts[0] == texts[-1] else f" ({texts[0]} … {texts[-1]})"
    return f"{texts[(len(texts) - 1) // 2]}{inside}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def ratio_table(found: Sequence[dict[str, Any]], mode: str = HEADLINE, quality: str | None = None) -> str:
    """Markdown: how many times the tokens training from scratch takes, a line per cell and level, worst first."""
    shown = [r for r in found if r["measure"] == "fvu" and r["level"] not in _ONLY_MEASURED]
    lines = [
        "| base saw such text | fine-tuning | base | compared at | scratch, tokens | adapted, tokens | ratio "
        "| held-out tokens counted |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for (*cell, level), rows in _worst_first(shown, mode, quality):
        sides = (_spread([r[side] for r in rows]) for side in ("scratch", "adapted"))
        ratios = (_times([r[name] for r in rows]) for name in ("ratio", "counted"))
        lines.append(f"| {' | '.join([*_named(*cell), level, *sides, *ratios])} |")
    return "\n".join(lines)


_ONLY_MEASURED = {f"scratch at {budget:,}" for budget in MEASURED_AT if budget not in AT_SCRATCH}


def measure_table(
    found: Sequence[dict[str, Any]], levels: Sequence[int], mode: str = HEADLINE, quality: str | None = None
) -> str:
    """Markdown: the ratio by every measure, where the adaptation is to equal training from scratch."""
    names = {f"scratch at {budget:,}" for budget in levels}
    shown = [r for r in found if r["level"] in names]
    lines = [
        f"| base saw such text | fine-tuning | base | compared at | {' | '.join(QUALITY.values())} |",
        f"|---|---|---|---|{'---:|' * len(QUALITY)}",
    ]
    for (*cell, level), rows in _worst_first(shown, mode, quality):
        by_measure = [_times([r["ratio"] for r in rows if r["measure"] == measure]) for measure in QUALITY]
        lines.append(f"| {' | '.join([*_named(*cell), level, *by_measure])} |")
    return "\n".join(lines)


def _worst_first(
    found: Sequence[dict[str, Any]], mode: str, quality: str | None
) -> list[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """(coverage, distance, quality, level) and its comparisons: first what was not reached, then by the FVU's ratio."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found:
        if row["mode"] == mode and quality in (None, row["quality"]):
            key = (row["coverage"], row["distance"], row["quality"], row["level"])
            groups.setdefault(key, []).append(row)

    def place(item: tuple[tuple[str, ...], list[dict[str, Any]]]) -> tuple[bool, float]:
        ratios = [r["ratio"] for r in item[1] if r["measure"] == "fvu"]
        return all(r.sign != "<" for r in ratios), statistics.median(r.value for r in ratios)

    return sorted(groups.items(), key=place)


def _named(coverage: str, distance: str, quality: str) -> list[str]:
    return [{"covered": "yes", "uncovered": "no"}[coverage], distance, quality]


def curve_table(rows: Sequence[Row], distance: str, coverage: str, quality: str) -> str:
    """Markdown: what every mode reaches after how many tokens, the mean over seeds with least and greatest FVU."""
    lines = [
        "| mode | tokens | FVU | KL | top-1 error | CE replaced | L0 | CPU s | GFLOP | MB, estimated | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for mode in MODES:
        here = of_cell(rows, mode, coverage, distance, quality)
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


def readme(data: dict[str, Any]) -> str:
    """The README's tables: the fixed cells, worst first: all levels of FVU, and one by every measure."""
    found, quality = comparisons(data["rows"]), data["headline_quality"]
    return (
        f"{ratio_table(found, quality=quality)}\n\nThe ratio by other measures than FVU:\n\n"
        f"{measure_table(found, MEASURED_AT[1:2], quality=quality)}"
    )


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
    parts += ["## By other measures", "", measure_table(found, MEASURED_AT), ""]
    for coverage, distance, quality in _cells(rows):
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
    "least and the greatest; < and > where a curve does not reach that far. Every run, from scratch or adapting, also "
    f"reads {HELD_OUT_TOKENS:,} held-out tokens, for scales, whitening and ridge: the last column counts them. CPU "
    "seconds: of the process, the model's forward counted once per token at its measured cost. All transcoders are "
    "TopK with the same k."
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
    _draw(rows, quality, results)
    print(readme(data))
    print(f"\n{len(rows)} runs; written to {results}")
    return 0


def _draw(rows: Sequence[Row], quality: str, results: Path) -> None:
    """The plots, a column for every cell of one quality of the base."""
    cells = [cell for cell in _cells(rows) if cell[2] == quality]
    try:
        for name, panels in PLOTS.items() if cells else ():
            plot(rows, cells, {panel: QUALITY[panel[1]] for panel in panels}, results / f"{name}.svg")
    except ImportError:
        print("no plots: pip install 'fasttc[bench]'")
