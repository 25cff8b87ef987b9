"""The scaling curves as a picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def plot(rows: list[dict[str, Any]], path: Path) -> bool:
    """Seconds against tokens: all targets, beside circuit-tracer's algorithm; a fixed number, beside the count.

    False, and no file, where the rows hold no scaling.
    """
    by_task = {row["task"]: row for row in rows}
    if "tokens_scaling" not in by_task or "targets_scaling" not in by_task:
        return False
    matplotlib.rcParams["svg.hashsalt"] = "fasttc"  # the same rows give the same file
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    every = by_task["tokens_scaling"]
    left.loglog(every["tokens"], every["seconds"], "o-", label="fasttc")
    for row in rows:
        if row["task"] == "replicated":
            label = f"circuit-tracer's algorithm, batch {row['batch']}"
            left.loglog(row["tokens"], row["seconds"], "s", label=label)
    left.set(title="all active features as targets", xlabel="tokens", ylabel="seconds, one thread")
    fixed = by_task["targets_scaling"]
    rate = fixed["seconds"][0] / fixed["operations"][0]
    right.loglog(fixed["tokens"], fixed["seconds"], "o-", label="fasttc")
    right.loglog(
        fixed["tokens"], [rate * count for count in fixed["operations"]], "--", label="counted a·T + b·T²"
    )
    right.set(title=f"{fixed['targets']} feature targets", xlabel="tokens")
    for axes, sizes, place in (
        (left, every["tokens"], "center left"),
        (right, fixed["tokens"], "upper left"),
    ):
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(loc=place)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
