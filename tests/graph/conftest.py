"""Small graphs with known answers, random graphs, and circuit-tracer's formulas written out on dense matrices."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fasttc.graph import Graph

ORACLE_CASES = ("gemma2_jumprelu", "llama_topk_skip")


def _by_hand(dtype: torch.dtype = torch.float64, **changed: Any) -> Graph:
    """2 layers, 2 tokens, features a = (0, 1, 5) and b = (1, 1, 7), one logit of probability 1/2.

    Nodes: a 0, b 1, errors 2 to 5 (layer 0 position 1 is 3), tokens 6 and 7, logit 8. Every row sums to 4.
    """
    edges = {
        (8, 1): 3.0, (8, 0): -1.0,
        (1, 0): 2.0, (1, 3): -1.0, (1, 7): 1.0,
        (0, 6): -1.0, (0, 7): 3.0,
    }  # fmt: skip
    adjacency = torch.zeros(9, 9, dtype=dtype)
    for (target, source), weight in edges.items():
        adjacency[target, source] = weight
    given: dict[str, Any] = {
        "features": torch.tensor([[0, 1, 5], [1, 1, 7]]),
        "activations": torch.tensor([1.5, 2.5]),
        "input_ids": torch.tensor([11, 12]),
        "logit_ids": torch.tensor([42]),
        "logit_probs": torch.tensor([0.5]),
    }
    return Graph.from_dense(changed.pop("adjacency", adjacency), **{**given, **changed})


@pytest.fixture
def by_hand() -> Callable[..., Graph]:
    """Builds the hand-made graph; keyword arguments replace what ``Graph.from_dense`` is given."""
    return _by_hand


def _random_case(
    seed: int, dtype: torch.dtype = torch.float64, n_layers: int = 3, n_tokens: int = 5, density: float = 0.6
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    features = (uniform(n_layers, n_tokens, 9) < 0.4).nonzero()
    n_logits = 1 + seed % 4
    errors = torch.arange(n_layers).repeat_interleave(n_tokens)
    layer = torch.cat(
        [features[:, 0], errors, torch.full((n_tokens,), -1), torch.full((n_logits,), n_layers)]
    )
    has_inputs = torch.ones(len(layer), dtype=torch.bool)
    has_inputs[len(features) : len(layer) - n_logits] = False
    allowed = (layer[None] < layer[:, None]) & has_inputs[:, None]
    signs = torch.where(uniform(*allowed.shape) < 0.5, -1.0, 1.0)
    weights = signs * torch.exp(2 * torch.randn(allowed.shape, generator=generator, dtype=torch.float64))
    return {
        "adjacency": (weights * (allowed & (uniform(*allowed.shape) < density))).to(dtype),
        "features": features,
        "activations": uniform(len(features)).float(),
        "input_ids": torch.randint(0, 100, (n_tokens,), generator=generator),
        "logit_ids": torch.arange(n_logits) + 7,
        "logit_probs": (uniform(n_logits) / n_logits).to(dtype),
    }


@pytest.fixture
def random_case() -> Callable[..., dict[str, Any]]:
    """Arguments of ``Graph.from_dense`` for a random graph with heavy-tailed signed edges, by seed."""
    return _random_case


# circuit-tracer's rules (methods.md 6.4 and 6.5), word for word on dense matrices


def _normalised(adjacency: Tensor) -> Tensor:
    return adjacency.abs() / adjacency.abs().sum(1, keepdim=True).clamp(min=1e-10)


def _influence(shares: Tensor, weights: Tensor) -> Tensor:
    step = weights @ shares
    total = step.clone()
    while bool(step.any()):
        step = step @ shares
        total += step
    return total


def _threshold(scores: Tensor, share: float) -> Tensor:
    descending = scores.flatten().sort(descending=True).values
    cumulative = descending.cumsum(0) / descending.sum()
    return descending[min(int(torch.searchsorted(cumulative, share)), len(cumulative) - 1)]


def _weights(graph: Graph) -> Tensor:
    weights = torch.zeros(graph.n_nodes, dtype=graph.values.dtype)
    weights[graph.logit_slice] = graph.logit_probs.to(weights)
    return weights


def _dense_influence(graph: Graph) -> Tensor:
    return _influence(_normalised(graph.dense()), _weights(graph))


def _dense_prune(graph: Graph, node_threshold: float, edge_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    influence = _dense_influence(graph)
    nodes = influence >= _threshold(influence, node_threshold)
    nodes[graph.token_slice.start :] = True
    adjacency = graph.dense() * nodes[None] * nodes[:, None]
    shares = _normalised(adjacency)
    scores = shares * (_influence(shares, _weights(graph)) + _weights(graph))[:, None]
    edges = scores >= _threshold(scores, edge_threshold)
    while True:
        alive = nodes.clone()
        alive[: graph.error_slice.stop] &= edges[:, : graph.error_slice.stop].any(0)
        alive[graph.feature_slice] &= edges[graph.feature_slice].any(1)
        edges = edges & alive[None] & alive[:, None]
        if torch.equal(alive, nodes):
            break
        nodes = alive
    order = influence.argsort(descending=True, stable=True)
    cumulative = torch.zeros_like(influence)
    cumulative[order] = influence[order].cumsum(0) / influence.sum()
    return nodes, edges, cumulative


def _dense_scores(graph: Graph) -> tuple[float, float, float]:
    shares, influence = _normalised(graph.dense()), _dense_influence(graph)
    tokens, errors = influence[graph.token_slice].sum(), influence[graph.error_slice].sum()
    explained = 1 - shares[:, graph.error_slice].sum(1)
    visited = influence + _weights(graph)
    rows = torch.cat(
        [torch.arange(graph.n_nodes)[graph.feature_slice], torch.arange(graph.n_nodes)[graph.logit_slice]]
    )
    return (
        float(tokens / (tokens + errors)),
        float((explained * visited).sum() / visited.sum()),
        float((explained * visited)[rows].sum() / visited[rows].sum()),
    )


@pytest.fixture
def dense() -> SimpleNamespace:
    """circuit-tracer's formulas on dense matrices: ``influence``, ``prune``, ``scores`` of a graph."""
    return SimpleNamespace(influence=_dense_influence, prune=_dense_prune, scores=_dense_scores)


@pytest.fixture(params=ORACLE_CASES)
def oracle(request: pytest.FixtureRequest, shared_data: Path) -> SimpleNamespace:
    """A reference case: graphs in both precisions, masks, scores and JSON as circuit-tracer made them."""
    folder = shared_data / "oracle" / request.param
    prompt = json.loads((folder / "prompt.json").read_text())
    (content,) = [p for p in (folder / "graph_json").glob("*.json") if p.name != "graph-metadata.json"]

    def graph(name: str, **described: Any) -> Graph:
        tensors = load_file(folder / f"{name}.safetensors")
        return Graph.from_dense(
            tensors["adjacency"],
            features=tensors["active_features"],
            activations=tensors["activation_values"],
            input_ids=tensors["input_tokens"],
            logit_ids=tensors["logit_token_ids"],
            logit_probs=tensors["logit_probabilities"],
            **described,
        )

    return SimpleNamespace(
        name=request.param,
        graph=graph,
        prompt=prompt,
        pruned=load_file(folder / "ct_prune.safetensors"),
        scores=json.loads((folder / "scores.json").read_text()),
        json=json.loads(content.read_text()),
        index=json.loads((folder / "graph_json" / "graph-metadata.json").read_text()),
    )
