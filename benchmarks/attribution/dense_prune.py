"""Influence, pruning and scores on a dense adjacency, as circuit-tracer 0.4.1 computes them: the competitor."""

import torch
from torch import Tensor

from .replicated import Dense


def _shares(adjacency: Tensor) -> Tensor:
    sizes = adjacency.abs()
    return sizes / sizes.sum(1, keepdim=True).clamp(min=1e-10)


def _influence(shares: Tensor, weights: Tensor) -> Tensor:
    arriving = weights @ shares
    total = arriving
    while bool(arriving.any()):
        arriving = arriving @ shares
        total = total + arriving
    return total


def _threshold(scores: Tensor, share: float) -> Tensor:
    ordered = torch.sort(scores.flatten(), descending=True).values
    reached = torch.cumsum(ordered, 0) / ordered.sum()
    return ordered[int(torch.searchsorted(reached, share).clamp(max=len(ordered) - 1))]


def _weights(graph: Dense) -> Tensor:
    weights = torch.zeros(len(graph.adjacency))
    weights[-len(graph.logit_probs) :] = graph.logit_probs
    return weights


def prune(
    graph: Dense, node_threshold: float = 0.8, edge_threshold: float = 0.98
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks over nodes ``[nodes]`` and edges ``[nodes, nodes]``, and cumulative scores ``[nodes]``."""
    weights, adjacency = _weights(graph), graph.adjacency
    n_features, first_token = len(graph.features), len(adjacency) - len(graph.logit_probs) - graph.n_tokens
    influence = _influence(_shares(adjacency), weights)
    nodes = influence >= _threshold(influence, node_threshold)
    nodes[first_token:] = True
    pruned = adjacency.clone()
    pruned[~nodes] = 0
    pruned[:, ~nodes] = 0
    shares = _shares(pruned)
    scores = shares * (_influence(shares, weights) + weights)[:, None]
    edges = scores >= _threshold(scores, edge_threshold)
    before = torch.zeros_like(nodes)
    while not torch.equal(before, nodes):
        before = nodes.clone()
        nodes[:first_token] &= edges[:, :first_token].any(0)
        nodes[:n_features] &= edges[:n_features].any(1)
        edges[~nodes] = False
        edges[:, ~nodes] = False
    ordered, order = torch.sort(influence, descending=True)
    cumulative = torch.zeros_like(influence)
    cumulative[order] = torch.cumsum(ordered, 0) / ordered.sum()
    return nodes, edges, cumulative


def scores(graph: Dense) -> tuple[float, float]:
    """Replacement and completeness."""
    weights, shares = _weights(graph), _shares(graph.adjacency)
    influence = _influence(shares, weights)
    logits, tokens = len(graph.logit_probs), graph.n_tokens
    errors = slice(len(graph.features), len(influence) - logits - tokens)
    from_tokens, from_errors = influence[errors.stop : errors.stop + tokens].sum(), influence[errors].sum()
    visited = influence + weights
    completeness = ((1 - shares[:, errors].sum(1)) * visited).sum() / visited.sum()
    return float(from_tokens / (from_tokens + from_errors)), float(completeness)
