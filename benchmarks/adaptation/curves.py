"""The curves of the ledger: what every mode reaches, against what it costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .runs import MODES

QUALITY = {"fvu": "FVU", "kl": "KL, nats", "top1_error": "top-1 error", "ce_replaced": "cross-entropy, nats"}
COST = {
    "tokens": "tokens",
    "cpu_seconds": "CPU seconds",
    "flops": "FLOP",
    "peak_bytes": "bytes at the peak (estimate)",
}
COLOURS = dict(zip(MODES[1:], ("C7", "C1", "C2", "C0"), strict=True))
Row = dict[str, Any]


def of_cell(rows: Sequence[Row], mode: str, coverage: str, distance: str, quality: str) -> list[Row]:
    """The runs of a mode in a cell; of training from scratch those of its distance."""
    where = ("", "") if mode == "scratch" else (coverage, quality)
    return [
        r for r in rows if (r["mode"], r["distance"], r["coverage"], r["quality"]) == (mode, distance, *where)
    ]


def plot(
    rows: Sequence[Row], cells: Sequence[tuple[str, str, str]], panels: dict[tuple[str, str], str], path: Path
) -> None:
    """A column for every cell, a row for every (cost, quality); every run a point, lines through the means of seeds.

    Text stays text: what a viewer shows it in depends on its fonts.

    Args:
        rows: of the ledger.
        cells: (coverage, distance, quality).
        panels: (field of the cost, field of the quality) -> label of the quality.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "fasttc", "svg.fonttype": "none"}
    size = {"figsize": (3.4 * len(cells), 2.8 * len(panels)), "sharey": "row", "squeeze": False}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(len(panels), len(cells), **size)
        for column, cell in zip(axes.T, cells, strict=True):
            for axis, (x, y) in zip(column, panels, strict=True):
                _panel(axis, rows, cell, x, y)
            column[0].set_title("{}, {}, base {}".format(*cell), fontsize=8)
        for line, ((x, _), label) in zip(axes, panels.items(), strict=True):
            line[0].set_ylabel(label)
            for axis in line:
                axis.set_xlabel(COST[x], fontsize=8)
        axes[0][0].legend(fontsize=7)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _panel(axis: Any, rows: Sequence[Row], cell: tuple[str, str, str], x: str, y: str) -> None:
    for mode, colour in COLOURS.items():
        here = of_cell(rows, mode, *cell)
        axis.plot([r[x] for r in here], [r[y] for r in here], ".", color=colour, markersize=3)
        budgets = [
            [r for r in here if r["budget"] == budget] for budget in sorted({r["budget"] for r in here})
        ]
        means = sorted(tuple(sum(r[name] for r in same) / len(same) for name in (x, y)) for same in budgets)
        axis.plot([m[0] for m in means], [m[1] for m in means], color=colour, label=mode, linewidth=1.2)
    for row in of_cell(rows, "unadapted", *cell):
        axis.axhline(row[y], color="black", linewidth=0.6, linestyle=":")
    axis.set(xscale="log", yscale="log")
    axis.tick_params(labelsize=7, which="both")
    axis.grid(alpha=0.3, which="both", linewidth=0.4)
