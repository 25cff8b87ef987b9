"""What is measured, one process each: every function here runs in a process of its own and returns what JSON can hold.

Times are seconds of CPU on one thread (:func:`.clock.now`). Memory is the peak of the resident set above what the
process held with model and transcoders loaded, in its first run (after one of a few tokens, so that libraries are set
up).
"""

import ctypes
import gc
import statistics
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import fasttc
from fasttc import Graph
from fasttc.attribution import attribute_many
from fasttc.benchmarks import record

from . import case, dense_prune
from .clock import now
from .replicated import Dense, Replicated

PROMPT_SEED = 7


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = now()
    result = call()
    return now() - start, result


def extra_memory(call: Callable[[], Any]) -> tuple[int, float, Any]:
    """Peak bytes above the present, seconds and result of a call."""
    gc.collect()
    with suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier work freed shall not hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = record.resident("VmRSS")
    seconds, result = timed(call)
    return record.resident("VmHWM") - before, seconds, result


def _ids(model: Any, tokens: int) -> torch.Tensor:
    return case.prompt(tokens, model.config.vocab_size, PROMPT_SEED)


def ours(folder: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """The whole graph with exact rows; left in the folder for the others to compare with."""
    model, tcs = case.open_case(folder)
    fasttc.attribute(model, tcs, _ids(model, 4))
    ids = _ids(model, tokens)
    extra, first, graph = extra_memory(lambda: fasttc.attribute(model, tcs, ids))
    graph.save(folder / "graph")
    sizes = {"features": graph.n_features, "nodes": graph.n_nodes, "edges": graph.n_edges}
    del graph
    times = [first, *(timed(lambda: fasttc.attribute(model, tcs, ids))[0] for _ in range(rounds - 1))]
    return {"seconds": statistics.median(times), "rounds": rounds, "extra": extra, **sizes}


def replicated(folder: Path, tokens: int, batch: int) -> dict[str, Any]:
    """circuit-tracer's algorithm; compares its edges with those that :func:`ours` left."""
    model, tcs = case.open_case(folder)
    Replicated(model, tcs, _ids(model, 4), 16).run()
    run = Replicated(model, tcs, _ids(model, tokens), batch)
    extra, seconds, dense = extra_memory(run.run)
    graph = Graph.load(folder / "graph")
    assert torch.equal(graph.features, dense.features), "both find the same active features"
    largest = float(dense.adjacency.abs().max())
    difference = float(dense.adjacency.sub_(graph.dense()).abs_().max()) / largest
    shares = {part: spent / seconds for part, spent in run.seconds.items()}
    return {"seconds": seconds, "extra": extra, "shares": shares, "difference": difference}


def prune(folder: Path, rounds: int) -> dict[str, Any]:
    """Pruning and scores of the graph of :func:`ours`."""
    graph = Graph.load(folder / "graph")
    extra, first, pruned = extra_memory(lambda: (graph.prune(), graph.scores())[0])
    times = [first, *(timed(lambda: (graph.prune(), graph.scores()))[0] for _ in range(rounds - 1))]
    kept = {"kept_nodes": pruned.n_nodes, "kept_edges": pruned.n_edges, "scores": list(graph.scores())}
    return {"seconds": statistics.median(times), "rounds": rounds, "extra": extra, **kept}


def prune_dense(folder: Path) -> dict[str, Any]:
    """The same in circuit-tracer's way; compares the masks."""
    graph = Graph.load(folder / "graph")
    dense = Dense(graph.dense(), graph.features, graph.logit_probs.float(), graph.n_tokens)
    extra, seconds, (nodes, edges, _) = extra_memory(lambda: dense_prune.prune(dense))
    more, scores = timed(lambda: dense_prune.scores(dense))
    same = float((graph.prune().dense_mask() == edges).float().mean())
    kept = {"kept_nodes": int(nodes.sum()), "kept_edges": int(edges.sum()), "scores": list(scores)}
    return {"seconds": seconds + more, "extra": extra, "same_edges": same, **kept}


def tokens_scaling(folder: Path, tokens: list[int], rounds: int) -> dict[str, Any]:
    """Median seconds of whole graphs, by length of the prompt; the lengths take turns."""
    model, tcs = case.open_case(folder)
    fasttc.attribute(model, tcs, _ids(model, 4))
    times: dict[int, list[float]] = {length: [] for length in tokens}
    for _ in range(rounds):
        for length in tokens:
            times[length].append(timed(lambda n=length: fasttc.attribute(model, tcs, _ids(model, n)))[0])
    return {"tokens": tokens, "rounds": rounds, "seconds": [statistics.median(times[n]) for n in tokens]}


def features_scaling(folder: Path, features: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """Median seconds of whole graphs, by features per layer, exactly as many of them active per token."""
    model, _ = case.open_case(folder)
    ids = _ids(model, tokens)
    sets = {n: case.top_k_set(model, n, case.Shape.active, seed=n) for n in features}
    times: dict[int, list[float]] = {n: [] for n in features}
    for tcs in sets.values():
        fasttc.attribute(model, tcs, ids)
    for _ in range(rounds):
        for n, tcs in sets.items():
            times[n].append(timed(lambda tcs=tcs: fasttc.attribute(model, tcs, ids))[0])
    return {
        "features": features,
        "rounds": rounds,
        "seconds": [statistics.median(times[n]) for n in features],
    }


def targets_scaling(folder: Path, tokens: list[int], targets: int, rounds: int) -> dict[str, Any]:
    """Median seconds with a fixed number of feature targets, and the operations counted for them."""
    model, tcs = case.open_case(folder)
    fasttc.attribute(model, tcs, _ids(model, 4))
    seconds, counted = [], []
    for length in tokens:
        runs = [
            timed(lambda n=length: fasttc.attribute(model, tcs, _ids(model, n), max_feature_nodes=targets))
            for _ in range(rounds)
        ]
        seconds.append(statistics.median(run[0] for run in runs))
        counted.append(operations(model.config, case.Shape.features, runs[0][1], length))
    return {"tokens": tokens, "targets": targets, "rounds": rounds, "seconds": seconds, "operations": counted}


def operations(config: Any, n_features: int, graph: Graph, length: int) -> float:
    """Multiplications of a graph's targets, without any of the engine's savings: linear and quadratic in positions."""
    width, heads, kv_heads, size = (
        getattr(config, name)
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    active = graph.metadata["active_features"] / (graph.n_layers * length)
    depth = torch.cat(
        [graph.features[:, 0].double(), torch.full((graph.n_logits,), float(graph.n_layers)).double()]
    )
    reach = torch.cat(
        [graph.features[:, 1].double() + 1, torch.full((graph.n_logits,), float(length)).double()]
    )
    linear = width * (size * (heads + kv_heads) + active)
    forward = length * graph.n_layers * width * (3 * config.intermediate_size + 2 * size * (heads + kv_heads))
    encoding = length * graph.n_layers * width * 2 * n_features
    attention = length**2 * graph.n_layers * size * heads * 2
    return (
        float((depth * reach * linear + depth * reach**2 / 2 * size * heads).sum())
        + forward
        + encoding
        + attention
    )


def long_prompt(folder: Path, tokens: int, targets: int) -> dict[str, Any]:
    """One long prompt with a fixed number of feature targets; ``peak`` is that of the whole process."""
    model, tcs = case.open_case(folder)
    extra, seconds, graph = extra_memory(
        lambda: fasttc.attribute(model, tcs, _ids(model, tokens), max_feature_nodes=targets)
    )
    sizes = {
        "features": graph.n_features,
        "active": graph.metadata["active_features"],
        "edges": graph.n_edges,
    }
    return {"tokens": tokens, "seconds": seconds, "extra": extra, "peak": record.resident("VmHWM"), **sizes}


def accuracy(folder: Path, tokens: int) -> dict[str, Any]:
    """Attention weights in bfloat16 against float32: the most influential edges, and signs of the edges kept."""
    model, tcs = case.open_case(folder)
    (exact,) = attribute_many(model, tcs, [_ids(model, tokens)])
    (short,) = attribute_many(model, tcs, [_ids(model, tokens)], weight_dtype=torch.bfloat16)
    return compare(exact, short)


def compare(exact: Graph, short: Graph, top: int = 100) -> dict[str, Any]:
    """Overlap of the ``top`` edges by influence, and the share of the exact graph's kept edges that change sign."""
    assert torch.equal(exact.features, short.features), "both have the same nodes"
    targets, sources, values = exact.prune().edges()
    flips = float((values.sign() != short.dense()[targets, sources].sign()).float().mean())
    best = [set(_most_influential(graph, top)) for graph in (exact, short)]
    return {"overlap": len(best[0] & best[1]) / top, "flips": flips, "kept": len(values)}


def _most_influential(graph: Graph, top: int) -> list[tuple[int, int]]:
    """Target and source of the edges that carry most of the targets' probability."""
    visited = graph.influence()
    visited[graph.logit_slice] += graph.logit_probs
    rows = torch.repeat_interleave(torch.arange(graph.n_nodes), graph.row_ptr.diff())
    shares = graph.values.double().abs() * (visited / graph.row_mass().clamp_min(1e-10))[rows]
    best = shares.topk(min(top, len(shares))).indices
    return list(zip(rows[best].tolist(), graph.columns[best].tolist(), strict=True))


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    task.__name__: task
    for task in (
        ours,
        replicated,
        prune,
        prune_dense,
        tokens_scaling,
        features_scaling,
        targets_scaling,
        long_prompt,
        accuracy,
    )
}
