"""Pruning against known answers, circuit-tracer's masks, and its rules on dense matrices."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fasttc.graph import Graph
from fasttc.graph._select import share_threshold
from fasttc.graph.prune import prune


def _edges(pruned):
    targets, sources, _ = pruned.edges()
    return set(zip(targets.tolist(), sources.tolist(), strict=True))


# Edge scores of the hand-made graph without its error: b -> logit 0.375, a -> logit 0.125, a -> b 0.25,
# token 1 -> b 0.125, token 0 -> a 0.09375, token 1 -> a 0.28125; 1.25 in all.
@pytest.mark.parametrize(
    ("edge_threshold", "dropped"),
    [
        (1.0, set()),
        (0.98, set()),
        (0.9, {(0, 6)}),
        (0.8, {(0, 6)}),  # the score where the share is reached is there twice: both stay
        (0.7, {(0, 6), (1, 7), (8, 0)}),
    ],
)
def test_known_edges(by_hand, edge_threshold, dropped):
    pruned = by_hand().prune(0.8, edge_threshold)
    assert pruned.node_mask.tolist() == [True, True, False, False, False, False, True, True, True]
    assert _edges(pruned) == {(8, 1), (8, 0), (1, 0), (1, 7), (0, 6), (0, 7)} - dropped
    assert (pruned.n_nodes, pruned.n_features, pruned.n_edges) == (5, 2, 6 - len(dropped))


def test_dead_ends_go_until_nothing_changes(by_hand):
    # Kept at first: b -> logit and token 1 -> a. So b has no input and a no output, and without them nothing is left.
    pruned = by_hand().prune(0.8, 0.5)
    assert pruned.node_mask.tolist() == [False] * 6 + [True] * 3
    assert pruned.n_edges == 0
    assert math.isnan(pruned.scores("ignore").replacement)


def test_known_nodes_and_cumulative_shares(by_hand):
    graph = by_hand()
    assert graph.prune(0.9, 1.0).node_mask.tolist() == [
        True,
        True,
        False,
        True,
        False,
        False,
        True,
        True,
        True,
    ]
    # Only b reaches the highest score; its edge from token 1 keeps it alive.
    assert _edges(graph.prune(0.0, 1.0)) == {(8, 1), (1, 7)}
    # b, token 1, a, error, token 0 in descending order; nodes without influence come last.
    influence, total = [0.375, 0.328125, 0.3125, 0.09375, 0.078125], 1.1875
    shares = np.cumsum(influence) / total
    expected = [shares[2], shares[0], 1, shares[3], 1, 1, shares[4], shares[1], 1]
    assert graph.prune().cumulative.tolist() == pytest.approx(expected, abs=1e-15)


def test_function_and_method_are_one(by_hand):
    graph = by_hand()
    assert torch.equal(prune(graph, 0.9, 0.7).edge_mask, graph.prune(0.9, 0.7).edge_mask)
    assert graph.prune().graph is graph
    assert repr(graph.prune()) == "PrunedGraph(5 of 9 nodes, 6 of 7 edges)"


@pytest.mark.parametrize("name", ["ct_graph", "ct_graph_f64"])
def test_reference_masks(oracle, name):
    pruned = oracle.graph(name).prune(0.8, 0.98)
    assert torch.equal(pruned.node_mask, oracle.pruned["node_mask"])
    assert torch.equal(pruned.dense_mask(), oracle.pruned["edge_mask"])
    assert (pruned.n_nodes, pruned.n_edges) == (oracle.scores["kept_nodes"], oracle.scores["kept_edges"])
    # The stored shares are a float32 running sum over all nodes.
    tolerance = pruned.graph.n_nodes * torch.finfo(torch.float32).eps
    assert torch.allclose(
        pruned.cumulative.float(), oracle.pruned["cumulative_scores"], rtol=0, atol=tolerance
    )
    assert pruned.full_scores == pruned.graph.scores()
    assert torch.equal(pruned.influence, pruned.graph.influence())


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.6), (0.95, 0.9), (0.3, 0.999)])
def test_agrees_with_dense_rules(random_case, dense, seed, thresholds):
    graph = Graph.from_dense(**random_case(seed, n_layers=1 + seed % 4, density=0.1 + 0.05 * seed))
    pruned = graph.prune(*thresholds)
    nodes, edges, cumulative = dense.prune(graph, *thresholds)
    assert torch.equal(pruned.node_mask, nodes)
    assert torch.equal(pruned.dense_mask(), edges)
    assert torch.allclose(pruned.cumulative, cumulative, rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 13])
def test_chunks_do_not_change_the_masks(random_case, monkeypatch, chunk):
    graph = Graph.from_dense(**random_case(5))
    whole = graph.prune()
    monkeypatch.setattr("fasttc.graph.influence.EDGES_PER_CHUNK", chunk)
    assert torch.equal(graph.prune().node_mask, whole.node_mask)
    assert torch.equal(graph.prune().edge_mask, whole.edge_mask)


def test_is_the_same_bit_for_bit(random_case):
    graph = Graph.from_dense(**random_case(6))
    first, second = graph.prune(), graph.prune()
    assert all(
        torch.equal(getattr(first, n), getattr(second, n)) for n in ("node_mask", "edge_mask", "cumulative")
    )


@pytest.mark.parametrize("seed", range(4))
def test_at_threshold_one_all_that_has_influence_stays(random_case, seed):
    graph = Graph.from_dense(**random_case(seed, density=1.0))
    pruned = graph.prune(1.0, 1.0)
    assert torch.equal(
        pruned.node_mask[: graph.token_slice.start], graph.influence()[: graph.token_slice.start] > 0
    )
    assert pruned.scores() == pytest.approx(tuple(graph.scores()), rel=1e-12)


@pytest.mark.parametrize(
    ("node", "edge", "name"), [(-0.1, 0.9, "node"), (0.8, 1.1, "edge"), (math.nan, 0.9, "node")]
)
def test_refuses_thresholds_that_are_not_shares(by_hand, node, edge, name):
    with pytest.raises(ValueError, match=f"{name}_threshold: expected a share from 0 to 1, got"):
        by_hand().prune(node, edge)


def test_a_graph_without_edges_can_be_pruned(by_hand):
    pruned = by_hand(adjacency=torch.zeros(9, 9)).prune()
    assert pruned.node_mask.tolist() == [False] * 6 + [True] * 3
    assert pruned.n_edges == 0


# The kept part as a graph of its own


def test_subgraph_holds_what_was_kept(random_case):
    graph = Graph.from_dense(**random_case(7))
    pruned = graph.prune(0.7, 0.8)
    small = pruned.subgraph()
    kept = pruned.node_mask.clone()
    kept[graph.n_features :] = True
    assert torch.equal(small.dense(), (graph.dense() * pruned.dense_mask())[kept][:, kept])
    assert torch.equal(small.features, graph.features[pruned.node_mask[: graph.n_features]])
    assert torch.equal(small.activations, graph.activations[pruned.node_mask[: graph.n_features]])
    assert torch.allclose(
        small.row_mass(), graph.row_mass()[kept] * (small.row_mass() > 0), rtol=1e-14, atol=0
    )
    origin = {"node_threshold": 0.7, "edge_threshold": 0.8, "nodes": graph.n_nodes, "edges": graph.n_edges}
    assert small.metadata == {"pruned": origin}
    assert graph.metadata == {}


def test_compact_refers_to_the_kept_part(random_case):
    pruned = Graph.from_dense(**random_case(8)).prune()
    small = pruned.compact()
    assert (small.n_nodes, small.n_edges, small.n_features) == (
        pruned.n_nodes,
        pruned.n_edges,
        pruned.n_features,
    )
    assert small.graph.n_edges == pruned.n_edges
    assert small.graph.n_features == pruned.n_features
    assert torch.equal(small.influence[small.node_mask], pruned.influence[pruned.node_mask])
    assert torch.equal(small.cumulative[small.node_mask], pruned.cumulative[pruned.node_mask])
    assert small.scores() == pytest.approx(tuple(pruned.scores()), rel=1e-13)
    assert small.full_scores == pruned.full_scores
    assert small.compact() is small


def test_scores_of_the_kept_part(by_hand, random_case, dense):
    graph = by_hand()
    # Only the error was dropped, and what is dropped counts as error: nothing changes.
    assert graph.prune(0.8, 1.0).scores() == pytest.approx(tuple(graph.scores()), abs=1e-15)
    assert graph.prune(0.8, 1.0).scores("ignore") == (1.0, 1.0, 1.0)
    # a -> logit, token 1 -> b and token 0 -> a go too: 1/8, then 3/8 * (1/4 + 1/4), then 3/16 * 1/4 are lost.
    scores = graph.prune(0.8, 0.7).scores()
    assert scores.replacement == pytest.approx(0.140625 / 0.5, abs=1e-15)
    assert scores.completeness_rows == pytest.approx(1 - 0.359375 / (0.5 + 0.375 + 0.1875), abs=1e-15)
    assert scores.completeness == pytest.approx(1 - 0.359375 / (1.0625 + 0.5), abs=1e-15)
    pruned = Graph.from_dense(**random_case(9)).prune()
    masked = Graph.from_dense(**{**random_case(9), "adjacency": pruned.graph.dense() * pruned.dense_mask()})
    assert pruned.scores("ignore") == pytest.approx(dense.scores(masked), rel=1e-12)
    with pytest.raises(ValueError, match="dropped: expected 'error' or 'ignore', got 'all'"):
        pruned.scores("all")


def test_more_pruning_never_explains_more(random_case):
    graph = Graph.from_dense(**random_case(10))
    scores = [graph.prune(share, 0.98).scores() for share in (1.0, 0.9, 0.8, 0.6, 0.4)]
    for before, after in pairwise(scores):
        assert all(second <= first + 1e-12 for first, second in zip(before, after, strict=True))


# Rows of which only a part is stored


def test_unstored_tails_leave_the_masks_alone(oracle):
    exact = oracle.graph("ct_graph_f64")
    adjacency = exact.dense()
    order = adjacency.abs().argsort(dim=1, descending=True)
    ordered = adjacency.abs().gather(1, order)
    above = (ordered.cumsum(1) - ordered) < 0.99999 * ordered.sum(1, keepdim=True)
    keep = torch.zeros_like(adjacency, dtype=torch.bool).scatter(1, order, above)
    graph = oracle.graph("ct_graph_f64", remainder=(adjacency * ~keep).abs().sum(1))
    stored = Graph.from_dense(
        adjacency * keep,
        **{
            n: getattr(graph, n)
            for n in ("features", "activations", "input_ids", "logit_ids", "logit_probs", "remainder")
        },
    )
    assert stored.n_edges < exact.n_edges
    pruned = stored.prune()
    assert torch.equal(pruned.node_mask, oracle.pruned["node_mask"])
    assert torch.equal(pruned.dense_mask(), oracle.pruned["edge_mask"])


def test_unstored_edges_count_in_the_influence_but_not_among_the_edges(by_hand):
    remainder = torch.zeros(9, dtype=torch.float64)
    remainder[0] = 4.0  # half of what enters a
    pruned = by_hand(remainder=remainder).prune(0.8, 0.7)
    assert pruned.influence.tolist() == [0.3125, 0.375, 0, 0.09375, 0, 0, 0.0390625, 0.2109375, 0]
    assert _edges(pruned) == _edges(by_hand().prune(0.8, 0.7))


# Selection by cumulative share


def _by_sorting(scores, share):
    descending = np.sort(scores)[::-1]
    cumulative = np.cumsum(descending) / descending.sum()
    return descending[min(int(np.searchsorted(cumulative, share)), len(scores) - 1)]


@pytest.mark.parametrize("size", [1, 2, 1000, 100_003])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 0.98, 0.9999])
def test_selects_as_sorting_does(size, share):
    random = np.random.default_rng(size)
    for scores in (random.random(size), np.exp(5 * random.standard_normal(size)), np.full(size, 0.1)):
        assert share_threshold(scores, share) == _by_sorting(scores, share)


def test_selects_among_ties_and_zeros():
    random = np.random.default_rng(0)
    scores = random.integers(0, 5, 100_000).astype(np.float64)
    for share in (0.1, 0.5, 0.9):
        assert share_threshold(scores, share) == _by_sorting(scores, share)
    assert share_threshold(scores, 1.0) == 1.0  # the lowest positive one
    assert share_threshold(np.zeros(100_000), 0.5) == 0.0
    assert share_threshold(np.zeros(0), 0.5) == 0.0
