"""Writes the tables of README.md and docs/, and charts beside the results, from the committed results.

A table stands between ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks:NAME -->``, each on a line of its own.

    python -m benchmarks report             rewrites what is stale
    python -m benchmarks report --check     exits with 1 if something is

NAME is a JSON file below benchmarks/results without its ending, such as ``cpu/step`` or ``nvidia-h200/encode``.
"""

import re
from pathlib import Path
from typing import Any

from . import record
from .adaptation import finetuning
from .adaptation import report as adaptation_report
from .adapters import report as adapters_report
from .circuits import shift
from .page import speed
from .plot import bars

BLOCK = re.compile(
    r"(<!-- benchmarks:(?P<name>[\w/.-]+) -->\n).*?(<!-- /benchmarks:(?P=name) -->)", re.DOTALL
)


def source_line(environment: dict[str, Any]) -> str:
    """Where and with what it was measured, in a sentence."""
    parts = [environment["device"], f"torch {environment['torch']}"]
    if environment["driver"]:
        parts += [f"Triton {environment['triton']}", f"driver {environment['driver']}"]
    else:
        count = environment["threads"]
        parts.append("1 thread" if count == 1 else f"{count} threads")
    return f"{', '.join(parts)}; commit {environment['commit']}, seed {environment['seed']}."


def _grid(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: text to the left, figures to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _cpu(data: dict[str, Any]) -> str:
    ours = next(row for row in data["rows"] if row["competitor"] == "fasttc")
    rows = []
    for row in data["rows"]:
        if row["median"] is None:
            continue
        spread = f"{row['p20']:.0f} to {row['p80']:.0f}"
        memory = (
            [f"{row['extra'] / 1e6:.0f}", f"{row['extra'] / ours['extra']:.2f}"] if row["extra"] else ["", ""]
        )
        rows.append(
            [
                row["competitor"],
                f"{row['median']:.0f}",
                spread,
                f"{row['median'] / ours['median']:.2f}",
                *memory,
            ]
        )
    header = ["training step", "median ms", "p20 to p80", "× time", "extra MB", "× memory"]
    text = f"N, D, F, K = {', '.join(ours['shape'].split(',')[:4])}, {ours['shape'].split(',')[4]}."
    return f"{_grid(header, rows)}\n\n{text} {source_line(data['environment'])}"


def _ops(data: dict[str, Any]) -> str:
    ours = {row["shape"]: row["median"] for row in data["rows"] if row["competitor"] == "fasttc"}
    rows = []
    for row in data["rows"]:
        if row["median"] is None:
            continue
        peak = "" if row["peak"] is None else f"{row['peak'] / 1e6:.0f}"
        reference = ours.get(row["shape"])
        ratio = f"{row['median'] / reference:.2f}" if reference else ""
        times = [f"{row[key]:.3g}" for key in ("median", "p20", "p80")]
        rows.append(
            [f"{row['op']}: {row['competitor']}", row["shape"], *times, ratio, f"{row['percent']:.0f}", peak]
        )
    header = ["op", "N,D,F,K,dtype", "median ms", "p20", "p80", "× time", "% of roof", "peak MB"]
    return f"{_grid(header, rows)}\n\n{source_line(data['environment'])}"


def _attribution(data: dict[str, Any]) -> str:
    rows = [
        [found["what"], found["measured"], found["target"]] for found in data["targets"] if found["headline"]
    ]
    return f"{_grid(['attribution', 'measured', 'target'], rows)}\n\n{source_line(data['environment'])}"


def _adaptation(data: dict[str, Any]) -> str:
    return f"{adaptation_report.readme(data)}\n\n{source_line(data['environment'])}"


def _finetuning(data: dict[str, Any]) -> str:
    return f"{finetuning.table(data['rows'])}\n\n{source_line(data['environment'])}"


def _adapters(data: dict[str, Any]) -> str:
    return f"{adapters_report.tables(data['rows'])}\n\n{_of_seeds(data)}"


def _shift(data: dict[str, Any]) -> str:
    return f"{shift.table(data['rows'])}\n\n{_of_seeds(data)}"


def _of_seeds(data: dict[str, Any]) -> str:
    """The source line of figures with several seeds."""
    numbers = sorted({row["seed"] for row in data["rows"]})
    named = f"seed {numbers[0]}" if len(numbers) == 1 else f"seeds {numbers[0]} to {numbers[-1]}"
    return source_line(data["environment"]).rsplit(", ", 1)[0] + f", {named}."


def _sweep(data: dict[str, Any]) -> str:
    """FVU by line: unadapted, adapted, from scratch."""
    columns = sorted(data["rows"][0].keys() - {"name"}, key=lambda name: (name != "unadapted", name))
    rows = [[row["name"], *(f"{row[column]:.4f}" for column in columns)] for row in data["rows"]]
    return f"{_grid([data['sweep'], *columns], rows)}\n\nFVU on test documents. {source_line(data['environment'])}"


def _memory(data: dict[str, Any]) -> str:
    """Estimate and peak of every shape."""
    rows = [
        [
            row["shape"],
            f"{row['expected'] / 1e6:,.0f}",
            f"{row['measured'] / 1e6:,.0f}",
            f"{row['error']:+.1%}",
        ]
        for row in data["rows"]
    ]
    header = ["adaptation", "estimate, MB", "peak, MB", "estimate off by"]
    return f"{_grid(header, rows)}\n\n{source_line(data['environment'])}"


def _page(data: dict[str, Any]) -> str:
    """Opening and dragging, beside their targets."""
    header = ["the page", "measured", "at worst", "target"]
    rows = [speed.figures(row) for row in data["rows"]]
    return f"{_grid(header, rows)}\n\n{speed.shown(data)} {source_line(data['environment'])}"


def _throughput(data: dict[str, Any]) -> str:
    rows = [[row["name"], f"{row['tokens_per_second']:,.0f}"] for row in data["rows"]]
    sizes = ", ".join(f"{name} {value:,}" for name, value in data["shape"].items())
    text = f"{data['ratio']:.1f} times as many; {sizes} in an update. {source_line(data['environment'])}"
    return f"{_grid(['PAT without the forward of the model', 'tokens per second'], rows)}\n\n{text}"


def _aot(data: dict[str, Any]) -> str:
    """Per module, the largest registers and shared memory on each architecture."""
    targets = list(dict.fromkeys(row["target"] for row in data["rows"]))
    modules = list(dict.fromkeys(row["module"] for row in data["rows"]))
    rows = []
    for module in modules:
        own = [row for row in data["rows"] if row["module"] == module]
        worst = [[row for row in own if row["target"] == target] for target in targets]
        cells = [
            f"{max(r['registers'] for r in part)}, {max(r['shared'] for r in part) / 1024:.0f} KB"
            for part in worst
        ]
        rows.append([f"`{module}`", str(len(own)), *cells])
    failed = sum(bool(row.get("error") or row["failures"]) for row in data["rows"])
    spilled = sum(row["spills"] > 0 for row in data["rows"])
    text = f"{len(data['rows'])} codes, {spilled} with spills, {failed} with a broken promise; Triton {data['triton']}."
    return f"{_grid(['module', 'codes', *targets], rows)}\n\n{text}"


def rendered(text: str, results: Path) -> str:
    """The text with every block filled.

    Raises:
        ValueError: a block names no result, or a kind of result that has no table.
    """

    def fill(match: re.Match) -> str:
        path = results / f"{match['name']}.json"
        if not path.is_file():
            raise ValueError(f"block {match['name']}: expected the file {path}, found none")
        data = record.read(path)
        tables = {
            "adaptation": _adaptation,
            "adapters": _adapters,
            "aot": _aot,
            "attribution": _attribution,
            "cpu": _cpu,
            "finetuning": _finetuning,
            "memory": _memory,
            "ops": _ops,
            "page": _page,
            "shift": _shift,
            "sweep": _sweep,
            "throughput": _throughput,
        }
        if data.get("kind") not in tables:
            raise ValueError(f"{path}: expected kind {' or '.join(tables)}, got {data.get('kind')!r}")
        return f"{match[1]}\n{tables[data['kind']](data)}\n\n{match[3]}"

    return BLOCK.sub(fill, text)


def plots(results: Path) -> dict[Path, str]:
    """A chart beside every committed training step: file -> its SVG."""
    found = {}
    for path in sorted(results.glob("*/step.json")):
        data = record.read(path)
        if data["kind"] != "cpu":
            continue
        rows = [
            (row["competitor"], row["median"], f"{row['median']:.0f} ms")
            for row in data["rows"]
            if row["median"] is not None
        ]
        shape = ", ".join(data["rows"][0]["shape"].split(",")[:4])
        title = f"Training step on {data['environment']['device']}, N, D, F, K = {shape}"
        found[path.with_suffix(".svg")] = bars(title, rows, "fasttc")
    return found


def main(arguments: list[str]) -> int:
    parser = record.parser("report", __doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if something is stale"
    )
    parser.add_argument("--root", type=Path, default=record.ROOT.parent, help="folder of README.md and docs/")
    parser.add_argument("--results", type=Path, default=record.ROOT / "results")
    options = parser.parse_args(arguments)
    pages = [options.root / "README.md", *sorted((options.root / "docs").rglob("*.md"))]
    wanted = {page: rendered(page.read_text(encoding="utf-8"), options.results) for page in pages}
    wanted |= plots(options.results)
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    print(*(f"stale: {path}" for path in stale), f"{len(wanted)} files, {len(stale)} stale", sep="\n")
    if options.check:
        return int(bool(stale))
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
    return 0
