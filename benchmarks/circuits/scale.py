"""Merge, paths and diff of a graph of 10,000 nodes: seconds of one core, and memory in a process of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fasttc.benchmarks import record
from fasttc.graph import Graph, diff, merge, strongest_paths

LIMITS = {"seconds": 10.0, "bytes": 2 << 30}
LAYERS, TOKENS, LOGITS = 12, 50, 10


def large_graph(nodes: int, edges: int, seed: int) -> Graph:
    """A random graph with heavy-tailed signed edges into features and logits, sources drawn from all lower layers."""
    generator = np.random.default_rng(seed)
    n_features = nodes - LAYERS * TOKENS - TOKENS - LOGITS
    place = np.sort(generator.integers(LAYERS * TOKENS, size=n_features))
    index = np.zeros(n_features, np.int64)
    for position in np.unique(place):
        members = np.flatnonzero(place == position)
        index[members] = np.sort(generator.choice(16384, len(members), replace=False))
    features = np.stack([place // TOKENS, place % TOKENS, index], axis=1)
    layer = np.concatenate(
        [features[:, 0], np.repeat(np.arange(LAYERS), TOKENS), np.full(TOKENS, -1), np.full(LOGITS, LAYERS)]
    )
    rows = np.concatenate([np.arange(n_features), np.arange(nodes - LOGITS, nodes)])
    per_row = edges // len(rows)
    counts, columns = np.zeros(nodes, np.int64), []
    for row in rows:
        below = np.flatnonzero(layer < layer[row])
        chosen = np.sort(generator.choice(below, min(per_row, len(below)), replace=False))
        counts[row] = len(chosen)
        columns.append(chosen)
    total = int(counts.sum())
    values = generator.choice([-1.0, 1.0], total) * np.exp(2 * generator.standard_normal(total))
    return Graph(
        n_layers=LAYERS,
        features=torch.from_numpy(features),
        activations=torch.ones(n_features),
        input_ids=torch.arange(TOKENS),
        logit_ids=torch.arange(LOGITS),
        logit_probs=torch.full((LOGITS,), 0.1),
        row_ptr=np.concatenate([[0], np.cumsum(counts)]),
        columns=np.concatenate(columns).astype(np.int32),
        values=values.astype(np.float32),
    )


def measure(what: str, nodes: int, edges: int, seed: int) -> dict[str, Any]:
    """One operation in this process: seconds of processor time, and the process's peak, everything counted."""
    torch.set_num_threads(1)
    graph = large_graph(nodes, edges, seed)
    pruned = graph.prune(1.0, 1.0)
    other = large_graph(nodes, edges, seed + 1) if what == "diff" else graph
    work: dict[str, Callable[[], Any]] = {
        "merge": lambda: merge(pruned).n_nodes,
        "paths": lambda: len(strongest_paths(graph, 100)),
        "diff": lambda: len(diff(pruned, other.prune(1.0, 1.0)).edges),
    }
    start = time.process_time()
    found = work[what]()
    seconds = time.process_time() - start
    row = {"operation": what, "nodes": graph.n_nodes, "edges": graph.n_edges, "result": found}
    return {**row, "seconds": round(seconds, 2), "bytes": record.resident("VmHWM")}


def elsewhere(what: str, nodes: int, edges: int, seed: int) -> dict[str, Any]:
    """:func:`measure` in a process of its own, on one thread."""
    call = f"scale.measure({what!r}, {nodes}, {edges}, {seed})"
    code = f"import json; from {__package__} import scale; print(json.dumps({call}))"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **threads},
    )
    return json.loads(done.stdout.splitlines()[-1])
