"""Influence and scores against known answers, against dense formulas, and within their bounds."""

import tracemalloc

import pytest
import torch

from fasttc.graph import Graph

EPS = torch.finfo(torch.float64).eps


def test_known_answers(by_hand):
    graph = by_hand()
    influence = graph.influence()
    assert influence.dtype == torch.float64
    # b: 1/2 * 3/4. a: 1/2 * 1/4 + 3/8 * 2/4. Error (0, 1): 3/8 / 4. Token 0: a / 4. Token 1: b / 4 + a * 3/4.
    assert influence.tolist() == [0.3125, 0.375, 0, 0.09375, 0, 0, 0.078125, 0.328125, 0]
    scores = graph.scores()
    assert scores.replacement == 0.8125
    assert scores.completeness == pytest.approx(1 - 0.09375 / 1.6875, abs=4 * EPS)
    assert scores.completeness_rows == pytest.approx(1 - 0.09375 / 1.1875, abs=4 * EPS)
    assert graph.scores(influence=influence) == scores
    assert graph.score_bounds().lower == graph.score_bounds().upper == scores
    assert graph.influence_bound().tolist() == [0.0] * 9


def test_all_mass_ends_in_tokens_and_errors(random_case):
    graph = Graph.from_dense(**random_case(0, density=1.0))
    influence = graph.influence()
    ends = influence[graph.token_slice].sum() + influence[graph.error_slice].sum()
    assert float(ends) == pytest.approx(float(graph.logit_probs.sum()), rel=1e-13)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("density", [0.05, 0.6])
def test_agrees_with_dense_formulas(random_case, dense, seed, density):
    graph = Graph.from_dense(**random_case(seed, density=density, n_layers=1 + seed % 4))
    # Each of at most N terms per node, over at most L + 1 steps, is rounded a few times.
    tolerance = 8 * graph.n_nodes * (graph.n_layers + 1) * EPS
    assert torch.allclose(graph.influence(), dense.influence(graph), rtol=tolerance, atol=0)
    assert graph.scores() == pytest.approx(dense.scores(graph), rel=tolerance, nan_ok=True)


def test_float32_edges_are_added_in_float64(random_case, dense):
    graph = Graph.from_dense(**random_case(1, torch.float32))
    exact = Graph.from_dense(**{**random_case(1, torch.float32), "adjacency": graph.dense().double()})
    assert torch.equal(graph.influence(), exact.influence())


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunks_do_not_change_the_result(random_case, monkeypatch, chunk):
    graph = Graph.from_dense(**random_case(2))
    whole, mass, scores = graph.influence(), graph.row_mass(), graph.scores()
    monkeypatch.setattr("fasttc.graph.influence.EDGES_PER_CHUNK", chunk)
    tolerance = 8 * graph.n_nodes * EPS
    assert torch.allclose(graph.row_mass(), mass, rtol=tolerance, atol=0)
    assert torch.allclose(graph.influence(), whole, rtol=tolerance, atol=0)
    assert graph.scores() == pytest.approx(scores, rel=tolerance)


def test_is_the_same_bit_for_bit(random_case):
    graph = Graph.from_dense(**random_case(4))
    assert all(torch.equal(graph.influence(), graph.influence()) for _ in range(5))


def test_scores_without_any_edge_are_not_numbers(by_hand):
    scores = by_hand(adjacency=torch.zeros(9, 9)).scores()
    assert scores.replacement != scores.replacement
    assert scores.completeness == scores.completeness_rows == 1.0


def test_reference_scores(oracle):
    single, double = oracle.graph("ct_graph").scores(), oracle.graph("ct_graph_f64").scores()
    assert single.replacement == pytest.approx(oracle.scores["replacement"], abs=1e-5)
    assert single.completeness == pytest.approx(oracle.scores["completeness"], abs=1e-5)
    assert double.replacement == pytest.approx(oracle.scores["float64"]["replacement"], abs=1e-9)
    assert double.completeness == pytest.approx(oracle.scores["float64"]["completeness"], abs=1e-9)


# Rows of which only a part is stored


def _partly_stored(case, keep):
    """The graph with only the edges in ``keep`` stored and the rest as remainder."""
    rest = (case["adjacency"] * ~keep).abs().sum(1)
    return Graph.from_dense(**{**case, "adjacency": case["adjacency"] * keep, "remainder": rest})


def _top_mass(adjacency, share):
    order = adjacency.abs().argsort(dim=1, descending=True)
    ordered = adjacency.abs().gather(1, order)
    before = ordered.cumsum(1) - ordered
    return torch.zeros_like(adjacency, dtype=torch.bool).scatter(
        1, order, before < share * ordered.sum(1, keepdim=True)
    )


def _assert_within_bounds(graph, exact):
    slack = 1e-12
    influence, truth = graph.influence(), exact.influence()
    assert bool((influence <= truth + slack).all())
    assert bool((truth <= influence + graph.influence_bound() + slack).all())
    bounds = graph.score_bounds()
    for low, estimate, true, high in zip(
        bounds.lower, graph.scores(), exact.scores(), bounds.upper, strict=True
    ):
        assert low - slack <= true <= high + slack
        assert low - slack <= estimate <= high + slack


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truth_lies_within_the_bounds(random_case, seed, share):
    case = random_case(seed, density=1.0)
    graph, exact = _partly_stored(case, _top_mass(case["adjacency"], share)), Graph.from_dense(**case)
    assert graph.n_edges < exact.n_edges
    assert torch.allclose(graph.row_mass(), exact.row_mass())
    _assert_within_bounds(graph, exact)
    assert torch.allclose(
        graph.influence(), exact.influence(), rtol=0, atol=float(graph.influence_bound().max())
    )


@pytest.mark.parametrize("seed", range(8))
def test_truth_lies_within_the_bounds_whatever_is_missing(random_case, seed):
    case = random_case(seed)
    keep = torch.rand(case["adjacency"].shape) < 0.5
    _assert_within_bounds(_partly_stored(case, keep), Graph.from_dense(**case))


def test_bounds_are_reached(by_hand):
    exact = by_hand()
    keep = torch.ones(9, 9, dtype=torch.bool)
    keep[1, 3] = False  # all that is missing is from an error: the lower end
    case = {"features": exact.features, "activations": exact.activations, "input_ids": exact.input_ids,
            "logit_ids": exact.logit_ids, "logit_probs": exact.logit_probs, "adjacency": exact.dense()}  # fmt: skip
    graph = _partly_stored(case, keep)
    assert graph.score_bounds().lower == pytest.approx(tuple(exact.scores()), abs=8 * EPS)
    assert graph.influence_bound().tolist() == [0.09375, 0, 0.09375, 0.09375, 0, 0, 0.09375, 0.09375, 0]
    assert float(exact.influence()[3] - graph.influence()[3]) == 0.09375
    keep[1, 3], keep[0] = True, False  # all that is missing is from tokens
    graph = _partly_stored(case, keep)
    assert graph.score_bounds().upper.replacement == pytest.approx(exact.scores().replacement, abs=8 * EPS)
    assert graph.score_bounds().upper.completeness == pytest.approx(exact.scores().completeness, abs=8 * EPS)


def test_a_row_of_which_nothing_is_stored(by_hand):
    remainder = torch.zeros(9, dtype=torch.float64)
    remainder[8] = 4.0
    graph = by_hand(adjacency=torch.zeros(9, 9), remainder=remainder)
    assert graph.influence().tolist() == [0.0] * 9
    assert graph.influence_bound().tolist() == [0.5] * 8 + [0]
    assert graph.score_bounds().lower == (0.0, 0.5, 0.0)
    assert graph.score_bounds().upper == (1.0, 1.0, 1.0)


def test_needs_no_square_matrix():
    n, n_tokens, fan_in = 60_000, 20, 8
    generator = torch.Generator().manual_seed(0)
    features = torch.stack(
        [torch.arange(n) // (n // 4), (torch.arange(n) % (n // 4)) // (n // 80), torch.arange(n)], 1
    )
    nodes = n + 4 * n_tokens + n_tokens + 2
    first = features[:, 0] * (n // 4)  # sources: features of lower layers, tokens for the lowest
    sources = (
        torch.rand(n, fan_in, generator=generator, dtype=torch.float64)
        * (first[:, None] - fan_in).clamp(min=0)
    ).long()
    tokens = torch.arange(fan_in) + n + 4 * n_tokens
    sources = torch.where(first[:, None] > 0, sources.sort(1).values + torch.arange(fan_in), tokens)
    logits = torch.arange(n - 3000, n).repeat(2)
    counts = torch.cat(
        [torch.full((n,), fan_in), torch.zeros(5 * n_tokens, dtype=torch.int64), torch.tensor([3000, 3000])]
    )
    columns = torch.cat([sources.flatten(), logits])
    graph = Graph(
        n_layers=4,
        features=features,
        activations=torch.ones(n),
        input_ids=torch.arange(n_tokens),
        logit_ids=torch.arange(2),
        logit_probs=torch.tensor([0.6, 0.3]),
        row_ptr=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        columns=columns,
        values=torch.rand(len(columns), generator=generator) + 0.1,
    )
    tracemalloc.start()
    pruned = graph.prune()
    scores = pruned.scores()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert scores.replacement > 0
    assert peak < 60 * 8 * nodes  # a bool matrix of nodes^2 would be 30 times that
