"""Graphs for the page, feature files, a running server, and one browser for all tests that need one."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttc.benchmarks.page.browser import browser, missing, ready
from fasttc.benchmarks.page.speed import random_graph
from fasttc.graph import Graph
from fasttc.report import PageServer, page_data

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror=window.pwned=2>",
    '"><svg onload=window.pwned=3>',
    "]]>&lt;!--\u2028\u202e\x00\U0001f600\ud800",
    "javascript:window.pwned=4",
    "%%data%%${window.pwned=5}`{{7*7}}",
)


@pytest.fixture(scope="session")
def small() -> Graph:
    """About 60 nodes in 4 layers and 6 positions."""
    return random_graph(60, layers=4, tokens=6, inputs=12)


@pytest.fixture(scope="session")
def tuned(small: Graph) -> Graph:
    """``small`` as if fine-tuned: edges changed, some features gone."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.exp(0.8 * torch.randn(small.n_edges, generator=generator))
    changed = replace(small, values=small.values * scale, metadata={"model": "tuned"})
    return changed.prune(0.8, 1.0).subgraph()


@pytest.fixture(scope="session")
def hostile(small: Graph) -> Graph:
    """``small`` with markup and script in every string."""
    strings = [HOSTILE[at % len(HOSTILE)] for at in range(8)]
    return replace(
        small,
        tokens=strings[: small.n_tokens],
        logit_labels=strings[: small.n_logits],
        prompt=" ".join(HOSTILE),
        metadata={"model": HOSTILE[0]},
    )


def feature_file(text: str = "fever", **more: Any) -> dict[str, Any]:
    """A feature file as ecosystem's viewers read them, with more entries."""
    example = {"tokens": ["a", " b", f" {text}"], "tokens_acts_list": [0.0, 0.5, 2.0], "train_token_ind": 2}
    return {
        "index": 5,
        "examples_quantiles": [
            {"quantile_name": "Top activations", "examples": [example] * 8},
            {"quantile_name": "Subsample interval 0", "examples": [example] * 4},
        ],
        "top_logits": [text, "hip"],
        "bottom_logits": ["the"],
        "top_embeddings": ["hot"],
        "act_min": 0.1,
        "act_max": 2.0,
        "histogram": [5, 3, 1],
        "activation_frequency": 0.012,
        **more,
    }


@pytest.fixture
def write_features(tmp_path: Path) -> Callable[..., Path]:
    """Writes feature files of the given (layer, index) pairs; returns the folder."""

    def write(
        pairs: list[tuple[int, int]],
        text: str = "fever",
        below: str = "",
        name: str = "features",
        **more: Any,
    ) -> Path:
        folder = tmp_path / name
        (folder / below).mkdir(parents=True, exist_ok=True)
        for layer, index in pairs:
            number = (layer + index) * (layer + index + 1) // 2 + index
            (folder / below / f"{number}.json").write_text(json.dumps(feature_file(text, **more)))
        return folder

    return write


@pytest.fixture
def serve() -> Iterator[Callable[..., PageServer]]:
    """Starts servers in threads and stops them all."""
    running: list[PageServer] = []

    def start(data: dict[str, Any], **options: Any) -> PageServer:
        server = PageServer(data, **options)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium; ``driver.downloads`` is where it saves files."""
    if reason := missing():
        pytest.skip(f"no browser: {reason}")
    folder = tmp_path_factory.mktemp("downloads")
    with browser(1280, 800, downloads=folder) as chromium:
        chromium.downloads = folder
        yield chromium


@pytest.fixture
def show(
    driver: Any, serve: Callable[..., PageServer], tmp_path: Path
) -> Iterator[Callable[..., PageServer]]:
    """Serves a graph and opens its page; the state file is ``tmp_path/g.supernodes.json``."""

    def open_page(graph: Graph, **options: Any) -> PageServer:
        data = options.pop("data", None) or page_data(graph, base=options.pop("base", None), name="g")
        server = serve(data, state_file=tmp_path / "g.supernodes.json", **options)
        driver.get_log("browser")
        driver.get(server.url)
        ready(driver)
        return server

    yield open_page
    driver.get("about:blank")  # what the page has not saved yet it must not send to a server that is gone
