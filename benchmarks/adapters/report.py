"""The tables of docs/adapters.md, from the rows that ``python -m benchmarks adapters`` writes."""

from typing import Any

Rows = list[dict[str, Any]]


def tables(rows: Rows) -> str:
    """Distance to the target, what is won back, words under ablation: Markdown, least and greatest over seeds."""
    return "\n\n".join([_distance(rows), _recovery(rows), _words(rows)])


def _distance(rows: Rows) -> str:
    found = []
    for pair, runs in _by_pair(rows):
        hybrids = [run["adapters"]["hybrid"] for run in runs]
        found.append(
            [pair, "none (hybrid)", _range(hybrids, "kl"), "-", _percent(hybrids, "top1_error"), "-"]
        )
        for name, shown in (("bias_only", "biases only"), ("adapters", f"F = {runs[0]['plan']['features']}")):
            quality = [run[name]["adapted"] for run in runs]
            layers = zip(*(q["l0"] for q in quality), strict=True)
            l0 = ", ".join(f"{sum(layer) / len(quality):.1f}" for layer in layers)
            taken = _percent([run[name] for run in runs], "kl_recovered")
            means = _range(quality, "mean_l0", ".2f")
            found.append(
                [
                    pair,
                    shown,
                    _range(quality, "kl"),
                    taken,
                    _percent(quality, "top1_error"),
                    f"{means} ({l0})",
                ]
            )
    header = [
        "target",
        "adapter",
        "KL to the target",
        "share taken away",
        "top-1 error",
        "mean L0 (by layer)",
    ]
    return _grid(header, found, text=2)


def _recovery(rows: Rows) -> str:
    found = []
    for pair, runs in _by_pair(rows):
        for score in runs[0]["recovery"]:
            won = [run["recovery"][score] for run in runs]
            show = _percent if score == "accuracy" else _tokens
            found.append(
                [
                    pair,
                    score,
                    *(show(won, name) for name in ("target", "hybrid", "adapted")),
                    _percent(won, "recovered"),
                ]
            )
    return _grid(["target", "score", "target's", "hybrid's", "adapted", "won back"], found, text=2)


def _words(rows: Rows) -> str:
    found = []
    for pair, runs in _by_pair(rows):
        for run in runs:
            if "words" in run:
                words = run["words"]
                figures = (
                    words[name]
                    for name in ("target", "hybrid", "adapted", "ablated", "change", "percentile_95")
                )
                changes = ", ".join(f"{change:.1f}" for change in sorted(words["control_changes"]))
                found.append([pair, str(run["seed"]), *(f"{value:.1f}" for value in figures), changes])
    header = [
        "target",
        "seed",
        "target's",
        "hybrid's",
        "adapted",
        "ablated",
        "change",
        "controls: 95th percentile",
    ]
    return _grid([*header, "all of them"], found, text=1)


def _by_pair(rows: Rows) -> list[tuple[str, Rows]]:
    names = dict.fromkeys(row["pair"] for row in rows)
    return [(name, [row for row in rows if row["pair"] == name]) for name in names]


def _range(rows: Rows, name: str, form: str = ".4f", unit: str = "") -> str:
    values = sorted(row[name] for row in rows)
    shown = list(dict.fromkeys(f"{value:{form}}" for value in (values[0], values[-1])))
    return " to ".join(shown) + unit


def _percent(rows: Rows, name: str) -> str:
    return _range([{name: 100 * row[name]} for row in rows], name, ".1f", " %")


def _tokens(rows: Rows, name: str) -> str:
    return _range(rows, name, ".1f")


def _grid(header: list[str], rows: list[list[str]], text: int) -> str:
    """A Markdown table; the first columns are text, the others figures."""
    rule = ["---"] * text + ["---:"] * (len(header) - text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
