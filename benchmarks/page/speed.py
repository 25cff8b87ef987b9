"""The page in a real browser: how fast a graph opens, and how many frames a second it keeps while a node is dragged.

A random graph of the wanted size is written as one HTML file and opened in headless Chromium, without a GPU: all
drawing is done by the CPU, which also drives the browser. Frames are counted by the page's own animation callbacks
while the pointer moves a node, and then the whole drawing.
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fasttc.benchmarks import record
from fasttc.graph import Graph
from fasttc.report import page_data, write_page

from .browser import browser, missing, ready

PROMPT = "the patient with a fever and hip pain was given the drug called : ( ) of to"
MOST_OPEN_MS, LEAST_FPS = 2000.0, 30.0  # the targets
_COUNT_FRAMES = """
window.frames_ = [];
const tick = (now) => { window.frames_.push(now); window.ticking_ = requestAnimationFrame(tick); };
window.ticking_ = requestAnimationFrame(tick);
"""
_FRAMES = "cancelAnimationFrame(window.ticking_); return window.frames_"


def random_graph(
    nodes: int = 530, layers: int = 18, tokens: int = 14, inputs: int = 40, seed: int = 0
) -> Graph:
    """A graph in which every one of about ``nodes`` nodes has influence: heavy-tailed signed edges, dense as real ones.

    Each feature and logit has ``inputs`` sources (fewer near the bottom); later positions hold more features.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 8
    count = nodes - tokens - logits
    weight = torch.linspace(0.3, 2.0, tokens)
    cell = torch.multinomial(weight, 4 * count, replacement=True, generator=generator)
    layer = torch.randint(layers, (4 * count,), generator=generator)
    index = torch.randint(4096, (4 * count,), generator=generator)
    features = torch.unique(torch.stack([layer, cell, index], dim=1)[:count], dim=0)
    places = torch.cat(
        [
            features[:, 0],
            torch.arange(layers).repeat_interleave(tokens),
            torch.full((tokens,), -1),
            torch.full((logits,), layers),
        ]
    )
    total, n = len(places), len(features)
    adjacency = torch.zeros(total, total)
    tokens_at = n + layers * tokens
    for target in [*range(n), *range(total - logits, total)]:
        below = (places < places[target]).nonzero().squeeze(1)
        below = below[(below < n) | (below >= tokens_at)]
        chosen = below[torch.randperm(len(below), generator=generator)[:inputs]]
        size = torch.exp(1.5 * torch.randn(len(chosen), generator=generator))
        sign = torch.where(torch.rand(len(chosen), generator=generator) < 0.3, -1.0, 1.0)
        adjacency[target, chosen] = sign * size
    words = PROMPT.split()
    return Graph.from_dense(
        adjacency,
        features=features,
        activations=torch.rand(n, generator=generator) * 4,
        input_ids=torch.arange(tokens),
        logit_ids=torch.arange(logits) + 100,
        logit_probs=torch.softmax(-torch.arange(logits) / 2.0, 0),
        n_layers=layers,
        tokens=[" " + words[at % len(words)] for at in range(tokens)],
        logit_labels=[f" output{at}" for at in range(logits)],
        prompt=" ".join(words[:tokens]),
        metadata={"model": "random"},
    )


def whole(data: dict[str, Any]) -> dict[str, Any]:
    """The page's data with sliders at 100 %: every node and edge of the graph is shown."""
    return {**data, "graphs": [{**graph, "thresholds": [1.0, 1.0]} for graph in data["graphs"]]}


def _frames_per_second(stamps: list[float]) -> dict[str, float]:
    gaps = [after - before for before, after in pairwise(stamps)]
    return {
        "frames": len(gaps),
        "fps": round(1000 * len(gaps) / sum(gaps), 1),
        "worst_frame_ms": round(max(gaps), 1),
        "p95_frame_ms": round(statistics.quantiles(gaps, n=20)[-1], 1),
    }


def _drag(driver: Any, x: float, y: float, seconds: float) -> dict[str, float]:
    """Presses at (x, y), moves the pointer to and fro for a while, lets go; counts the frames meanwhile."""

    def mouse(kind: str, at_x: float, at_y: float) -> None:
        event = {"type": kind, "x": at_x, "y": at_y, "button": "left", "buttons": 1, "clickCount": 1}
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
    mouse("mousePressed", x, y)
    mouse("mouseMoved", x + 5, y + 5)
    driver.execute_script(_COUNT_FRAMES)
    began, step = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step += 1
        mouse("mouseMoved", x + 60 * ((step % 40) / 20 - 1), y + 40 * ((step % 30) / 15 - 1))
    stamps = driver.execute_script(_FRAMES)
    mouse("mouseReleased", x, y)
    return {**_frames_per_second(stamps), "moves": step}


def measure(nodes: int, rounds: int, seconds: float, seed: int) -> dict[str, Any]:
    """Everything that is printed and written but the machine: what was shown, and ``rows`` of figures and targets."""
    data = whole(page_data(random_graph(nodes, seed=seed), name="bench"))
    with tempfile.TemporaryDirectory() as folder, browser() as driver:
        path = Path(folder) / "bench.html"
        write_page(path, data)
        opened = []
        for _ in range(rounds):
            driver.get("about:blank")
            driver.get(path.as_uri())
            opened.append(ready(driver))
        size = driver.execute_script("const s = fasttc.app.scene; return [s.nodes.length, s.edges.length]")
        box = driver.execute_script(
            "const nodes = [...document.querySelectorAll('g.node.feature')];"
            "const b = nodes[nodes.length >> 1].getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]"
        )
        drags = {
            "dragging a node": _drag(driver, *box, seconds),
            "dragging the drawing": _drag(driver, 30, 500, seconds),
        }
        opening = {"open_ms": round(statistics.median(opened), 1), "worst_ms": max(opened)}
        return {
            "browser": driver.capabilities["browserVersion"],
            "nodes": size[0],
            "edges": size[1],
            "html_bytes": path.stat().st_size,
            "rows": [
                {
                    "what": f"opening (median of {rounds})",
                    **opening,
                    "met": opening["open_ms"] < MOST_OPEN_MS,
                },
                *({"what": what, **drag, "met": drag["fps"] > LEAST_FPS} for what, drag in drags.items()),
            ],
        }


def figures(row: dict[str, Any]) -> list[str]:
    """A row as text: what, measured, at worst, target."""
    if "open_ms" in row:
        return [
            row["what"],
            f"{row['open_ms']:,.0f} ms",
            f"{row['worst_ms']:,.0f} ms",
            f"< {MOST_OPEN_MS:,.0f} ms",
        ]
    worst = f"{row['worst_frame_ms']:.1f} ms between frames"
    return [row["what"], f"{row['fps']:.1f} frames/s", worst, f"> {LEAST_FPS:.0f} frames/s"]


def shown(result: dict[str, Any]) -> str:
    """What the figures are of, in a sentence."""
    size = f"{result['nodes']} nodes, {result['edges']:,} edges, a file of {result['html_bytes']:,} bytes"
    return f"{size}; Chromium {result['browser']}, headless, no GPU."


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks page", description=__doc__)
    parser.add_argument("--nodes", type=int, default=530, help="a few have no influence")
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often the page is opened; the median is printed"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each drag")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=record.ROOT / "results/cpu/page.json")
    options = parser.parse_args(arguments)
    if reason := missing():
        print(f"page: {reason}", file=sys.stderr)
        return 2
    result = measure(options.nodes, options.rounds, options.seconds, options.seed)
    rows = result.pop("rows")
    head = {"kind": "page", "environment": record.environment("cpu", options.seed)}
    record.write(options.out, {**head, **result}, rows)
    print(shown(result))
    for row in rows:
        what, measured, worst, target = figures(row)
        print(f"{what}: {measured}, at worst {worst} ({'met' if row['met'] else 'MISSED'}: {target})")
    return 0 if all(row["met"] for row in rows) else 1
