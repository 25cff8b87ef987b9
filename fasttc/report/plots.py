"""Curves and bars as files: quality by layer, training curves, influence by path length, and what a diff found.

Every function takes plain numbers, writes one file (``.png``, ``.svg`` or ``.pdf``, whole or absent) and draws the same
bytes for the same numbers. matplotlib is an extra, ``pip install 'fasttc[plots]'``; its global state is left alone.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fasttc._files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
INK, QUIET, GRID = "#22262b", "#71767e", "#e4e0d8"
BEFORE, AFTER = "#b4b3ae", "#2b79ad"  # the page's colours: base, fine-tuned
GAINED, LOST = "#2c8a5b", "#b33a77"
_SERIES = ("#2b79ad", "#cf6a24", "#2c8a5b", "#6552c9", "#b33a77", "#8a7a3d")
_STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.edgecolor": QUIET,
    "axes.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8, "xtick.color": QUIET, "ytick.color": QUIET,
    "text.color": INK, "legend.frameon": False, "lines.linewidth": 1.6, "svg.hashsalt": "fasttc",
    "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip


def check_plot(path: str | Path) -> None:
    """Raises ``ValueError`` if nothing can be drawn to ``path``: before hours are spent on what is to be drawn."""
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"plot: expected a file that ends in {', '.join(FORMATS)}, got {str(path)!r}")
    if find_spec("matplotlib") is None:
        raise ValueError("plot: expected matplotlib to be installed, it is not: pip install 'fasttc[plots]'")


@contextmanager
def _figure(
    path: str | Path, columns: int = 1, width: float = 3.4, height: float = 2.7
) -> Iterator["Figure"]:
    """A figure that is written when the block ends well."""
    check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width * columns, height), layout="constrained", dpi=160)
        yield figure
        kind = Path(path).suffix.lower()[1:]
        undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=undated[kind])


def quality_by_layer(report: Mapping[str, Any], path: str | Path) -> None:
    """FVU, L0 and the cost in cross-entropy of every layer, from an evaluation's ``to_dict()``.

    The title holds KL and top-1 error, which are measured with all layers replaced.

    Raises:
        ValueError: the report has no layers; ``path`` has another ending; matplotlib is missing.
    """
    layers = report["layers"]
    if not layers:
        raise ValueError("report: expected at least one layer, got none")
    at = np.array([layer["layer"] for layer in layers])
    panels = [
        ("FVU", [layer["fvu"] for layer in layers]),
        ("L0", [layer["l0"] for layer in layers]),
    ]
    if all(layer.get("ce_replaced") is not None for layer in layers):
        added = [layer["ce_replaced"] - report["ce_original"] for layer in layers]
        panels.append(("added cross-entropy, layer alone (nats)", added))
    with _figure(path, len(panels)) as figure:
        figure.suptitle(
            f"all layers replaced: KL {report['kl']:.3g} nats, top-1 error {100 * report['top1_error']:.1f} %",
            fontsize=10,
        )
        for number, (title, values) in enumerate(panels, start=1):
            axes = figure.add_subplot(1, len(panels), number)
            axes.bar(at, _numbers(values), color=AFTER, width=0.7)
            axes.set(title=title, xlabel="layer")
            _whole_numbers(axes)
            axes.grid(visible=False, axis="x")


def adapters_by_layer(report: Mapping[str, Any], path: str | Path) -> None:
    """Distance to the target by layer without (grey) and with adapters, from an adapter evaluation's ``to_dict()``.

    Panels: NMSE of each residual, after the embeddings and every layer; KL with one layer alone hybrid, where it was
    measured; L0.

    Raises:
        ValueError: the report has no layers; ``path`` has another ending; matplotlib is missing.
    """
    hybrid, adapted = report["hybrid"], report["adapted"]
    if not adapted["l0"]:
        raise ValueError("report: expected at least one layer of adapters, got none")
    panels = [
        ("NMSE of the residual after a layer", hybrid["nmse"][1:], adapted["nmse"][1:]),
        ("KL, layer alone (nats)", report["single_hybrid_kl"], report["single_adapted_kl"]),
        ("L0", [], adapted["l0"]),
    ]
    panels = [panel for panel in panels if panel[2]]
    with _figure(path, len(panels)) as figure:
        title = f"KL {hybrid['kl']:.3g} nats without adapters (grey), {adapted['kl']:.3g} with them"
        figure.suptitle(title, fontsize=10)
        for number, (title, before, after) in enumerate(panels, start=1):
            axes = figure.add_subplot(1, len(panels), number)
            at = np.arange(len(after))
            if before:
                axes.bar(at - 0.2, _numbers(before), color=BEFORE, width=0.38)
            axes.bar(at + (0.2 if before else 0), _numbers(after), color=AFTER, width=0.38)
            axes.set(title=title, xlabel="layer")
            _whole_numbers(axes)
            axes.grid(visible=False, axis="x")


def shift_by_layer(report: Mapping[str, Any], path: str | Path, *, layer: int) -> None:
    """Shift of every class by layer, and where one layer's classes were and went, from a shift report's ``to_dict()``.

    Raises:
        ValueError: a layer that the report lacks; ``path`` has another ending; matplotlib is missing.
    """
    layers = report["layers"]
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer: expected one of the report's {len(layers)}, got {layer}")
    with _figure(path, 2, width=4.4, height=3.4) as figure:
        lines, plane = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
        for number, found in enumerate(layers[layer]["classes"]):
            colour = _SERIES[number % len(_SERIES)]
            shifts = _numbers([one["classes"][number]["shift"] for one in layers])
            lines.plot(np.arange(len(layers)), shifts, "o-", color=colour, markersize=3)
            before, after = found["base"], found["tuned"]
            plane.plot(*before, "o", color=colour, markersize=4, fillstyle="none")
            plane.annotate("", after, before, arrowprops={"arrowstyle": "->", "color": colour})
            plane.annotate(_plain(found["name"]), after, color=colour, fontsize=7)
            plane.plot(*after, "o", color=colour, markersize=4)
        lines.set(title="shift of class means / spread within classes", xlabel="residual before layer")
        _whole_numbers(lines)
        share = layers[layer]["explained"]
        plane.set(title=f"layer {layer}: base (open) to fine-tuned, {100 * share:.0f} % of the variance")
        plane.grid(visible=False)
        plane.set(xticks=[], yticks=[])


def training_curves(log: str | Path, path: str | Path) -> None:
    """Every metric of a training's ``metrics.jsonl`` against the tokens processed; metrics by layer as one line each.

    Raises:
        ValueError: the log is absent, empty or broken; ``path`` has another ending; matplotlib is missing.
    """
    rows = _rows(log)
    given = ("step", "tokens", "seconds")
    names = [name for name in rows[-1] if name not in given and _is_metric(rows[-1][name])]
    if not names:
        raise ValueError(
            f"{log}: expected a training log with metrics, got {', '.join(rows[-1]) or 'nothing'}"
        )
    across = min(len(names), 3)
    down = -(-len(names) // across)
    with _figure(path, across, height=2.6 * down) as figure:
        for number, name in enumerate(names, start=1):
            axes = figure.add_subplot(down, across, number)
            kept = [row for row in rows if row.get(name) is not None]
            values = np.array([np.atleast_1d(_numbers(row[name])) for row in kept])  # [lines, layers]
            tokens = [row["tokens"] for row in kept]
            for layer, line in enumerate(values.T):
                axes.plot(tokens, line, color=_shade(layer, values.shape[1]), label=f"layer {layer}")
            axes.set(title=name, xlabel="tokens")
            if 1 < values.shape[1] <= 8:
                axes.legend(fontsize=7)
            if name in ("loss", "fvu") and np.nanmin(values) > 0:
                axes.set_yscale("log")


def influence_by_length(shares: Mapping[str, ArrayLike], path: str | Path) -> None:
    """Share of the influence that arrives over paths of each length, one curve per name.

    Args:
        shares: name -> ``[n]``; entry ``i`` belongs to paths of ``i + 1`` edges.
        path: file to write.

    Raises:
        ValueError: no curves, or one that is not ``[n]``; ``path`` has another ending; matplotlib is missing.
    """
    curves = {name: np.asarray(values, dtype=float) for name, values in shares.items()}
    if not curves:
        raise ValueError("shares: expected at least one curve, got none")
    for name, values in curves.items():
        if values.ndim != 1 or not values.size:
            raise ValueError(f"shares: expected [n] for {name!r}, got shape {list(values.shape)}")
    with _figure(path, width=4.6) as figure:
        axes = figure.add_subplot()
        for number, (name, values) in enumerate(curves.items()):
            colour = _SERIES[number % len(_SERIES)]
            axes.plot(
                1 + np.arange(values.size), values, "o-", color=colour, label=_plain(name), markersize=3.5
            )
        axes.set(
            title="influence by path length", xlabel="edges in the path", ylabel="share of the influence"
        )
        axes.set_ylim(bottom=0)
        _whole_numbers(axes)
        if len(curves) > 1:
            axes.legend()


def diff_bars(
    names: list[str], before: ArrayLike, after: ArrayLike, path: str | Path, *, most: int = 20
) -> None:
    """What changed most from one graph to another: two bars per node, edge or group, the largest change on top.

    Args:
        names: ``n`` names; they are shown as they are.
        before, after: ``[n]`` influence (or another size) in the base and in the fine-tuned graph; 0 where absent.
        path: file to write.
        most: how many are shown.

    Raises:
        ValueError: no names, or other lengths; ``path`` has another ending; matplotlib is missing.
    """
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if not len(names) or old.shape != (len(names),) or new.shape != (len(names),):
        raise ValueError(
            f"names: expected one or more, and as many numbers before and after, got {len(names)} names, "
            f"{list(old.shape)} and {list(new.shape)}"
        )
    chosen = np.argsort(-np.abs(new - old), kind="stable")[:most][::-1]
    place = np.arange(len(chosen))
    with _figure(path, width=6, height=0.9 + 0.3 * len(chosen)) as figure:
        axes = figure.add_subplot()
        colours = [GAINED if new[at] > old[at] else LOST for at in chosen]
        axes.barh(place + 0.19, old[chosen], height=0.36, color=BEFORE, label="base")
        axes.barh(place - 0.19, new[chosen], height=0.36, color=colours, label="fine-tuned")
        axes.set_yticks(place, [_plain(names[at]) for at in chosen.tolist()])
        axes.set(title="base (grey) and fine-tuned (green: more, magenta: less)", xlabel="influence")
        axes.grid(visible=False, axis="y")


def _rows(log: str | Path) -> list[dict[str, Any]]:
    if not Path(log).is_file():
        raise ValueError(f"{log}: expected a training log (metrics.jsonl), there is no file of that name")
    try:
        rows = [
            json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{log}: expected one JSON object per line, got {error}") from error
    if not rows or not all(isinstance(row, dict) and "tokens" in row for row in rows):
        raise ValueError(f"{log}: expected lines with 'tokens', got {len(rows)} lines, not all with it")
    return rows


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _is_metric(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, list) and len(value) > 0)


def _numbers(values: Any) -> np.ndarray[Any, Any]:
    """Floats; None, which JSON has for what is not finite, as NaN."""
    return np.array(values, dtype=float)


def _shade(layer: int, layers: int) -> tuple[float, float, float]:
    """Lower layers lighter."""
    depth = 1.0 if layers == 1 else 0.35 + 0.65 * layer / (layers - 1)
    red, green, blue = (int(AFTER[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return (1 - depth * (1 - red), 1 - depth * (1 - green), 1 - depth * (1 - blue))


def _plain(text: str) -> str:
    """``$`` starts a formula in matplotlib: names are data, and shown as they are."""
    return text.replace("$", r"\$")


__all__ = [
    "adapters_by_layer",
    "check_plot",
    "diff_bars",
    "influence_by_length",
    "quality_by_layer",
    "shift_by_layer",
    "training_curves",
]
