"""Paths against all paths written out, influence by length and past a set against the matrix series."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fasttc.graph import Graph, influence_avoiding, length_profile, strongest_paths, whole_graph
from fasttc.graph.mechanism import (
    bootstrap_draws,
    bootstrap_interval,
    concept_features,
    concept_nodes,
    mechanism,
    mechanism_report,
)

EPS = float(np.finfo(np.float64).eps)


def _shares(graph: Graph) -> torch.Tensor:
    return graph.dense().double().abs() / graph.row_mass().clamp(min=1e-10)[:, None]


def _every_path(graph: Graph, logit: int, sources: set[int]) -> dict[tuple[int, ...], float]:
    """All paths from sources to a logit with their strengths, source first."""
    shares = _shares(graph)
    found: dict[tuple[int, ...], float] = {}

    def go(nodes: tuple[int, ...], strength: float) -> None:
        if nodes[-1] in sources:
            found[nodes[::-1]] = strength
        for source in shares[nodes[-1]].nonzero().squeeze(1).tolist():
            go((*nodes, source), strength * float(shares[nodes[-1], source]))

    go((graph.logit_slice.start + logit,), 1.0)
    return found


def _small(random_case, seed: int) -> Graph:
    return Graph.from_dense(**random_case(seed, n_layers=3, n_tokens=2, density=0.5))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", ["all", "through", "avoiding", "both", "from features"])
def test_best_paths_are_those_of_all_paths(random_case, seed, rule):
    graph = _small(random_case, seed)
    tokens = set(range(graph.token_slice.start, graph.token_slice.stop))
    through = {1, graph.token_slice.start} if rule in ("through", "both") else None
    avoiding = {0, 3} if rule in ("avoiding", "both") else set()
    sources = {0, 1, 2} if rule == "from features" else tokens
    logit = seed % graph.n_logits
    allowed = {
        nodes: strength
        for nodes, strength in _every_path(graph, logit, sources).items()
        if not avoiding & set(nodes) and (through is None or through & set(nodes))
    }
    wanted = sorted(allowed.values(), reverse=True)
    given = {"sources": sources} if rule == "from features" else {}
    for k in (1, 7, len(wanted) + 5):
        found = strongest_paths(graph, k, logit=logit, through=through, avoiding=avoiding, **given)
        assert len(found) == min(k, len(wanted))
        assert len({path.nodes for path in found}) == len(found)
        for path, strength in zip(found, wanted, strict=False):
            assert math.isclose(path.strength, strength, rel_tol=16 * EPS)
            assert math.isclose(path.strength, allowed[path.nodes], rel_tol=16 * EPS)
            signs = [float(graph.dense()[target, source]) for source, target in pairwise(path.nodes)]
            assert path.sign == math.prod(1 if weight > 0 else -1 for weight in signs)


def test_equal_paths_come_in_a_fixed_order():
    features = torch.tensor([[0, 0, i] for i in range(6)])
    adjacency = torch.zeros(6 + 2 + 2 + 1, 11, dtype=torch.float64)
    adjacency[10, :6], adjacency[:6, 8] = 1.0, 1.0
    graph = Graph.from_dense(
        adjacency, features=features, activations=torch.ones(6), input_ids=[1, 2], logit_ids=[3], logit_probs=[1.0],
        n_layers=1,
    )  # fmt: skip
    assert [path.nodes for path in strongest_paths(graph, 4)] == [(8, i, 10) for i in range(4)]


def test_paths_of_a_pruned_graph_keep_their_strength(random_case):
    graph = Graph.from_dense(**random_case(3))
    pruned = graph.prune(0.6, 0.9)
    small, whole = strongest_paths(pruned, 5), {path.strength for path in strongest_paths(graph, 10**6)}
    assert small
    assert whole_graph(pruned).n_features < graph.n_features
    assert all(any(math.isclose(path.strength, other, rel_tol=64 * EPS) for other in whole) for path in small)


def test_no_path_is_an_empty_list(by_hand):
    assert strongest_paths(by_hand(), 3, avoiding=[0, 1]) == []
    assert strongest_paths(by_hand(), 3, through=[2]) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"logit": 1}, "logit: expected a number from 0 to 0, got 1"),
        ({"through": [9]}, "through: expected node numbers below 9, got 9"),
        ({"avoiding": [-1]}, "avoiding: expected node numbers below 9, got -1"),
        ({"sources": [99]}, "sources: expected node numbers below 9, got 99"),
    ],
)
def test_refuses_nodes_that_do_not_exist(by_hand, given, message):
    with pytest.raises(ValueError, match=message):
        strongest_paths(by_hand(), **given)


@pytest.mark.parametrize("seed", range(3))
def test_lengths_are_the_powers_of_the_shares(random_case, seed):
    graph = Graph.from_dense(**random_case(seed))
    profile = length_profile(graph)
    step = torch.zeros(graph.n_nodes, dtype=torch.float64)
    step[graph.logit_slice] = graph.logit_probs.double() / graph.logit_probs.double().sum()
    budget = 64 * EPS * graph.n_nodes
    for n, (features, errors, tokens) in enumerate(
        zip(profile.features, profile.errors, profile.tokens, strict=True)
    ):
        step = step @ _shares(graph)
        for place, value in (
            (graph.feature_slice, features), (graph.error_slice, errors), (graph.token_slice, tokens),
        ):  # fmt: skip
            assert abs(float(step[place].sum()) - value) <= budget, n
    stuck = graph.influence()[graph.feature_slice][graph.row_mass()[graph.feature_slice] == 0].sum()
    ends = sum(profile.tokens) + sum(profile.errors) + sum(profile.missing)
    assert abs(ends + float(stuck) / float(graph.logit_probs.sum()) - 1) <= budget
    weighted = sum((n + 1) * share for n, share in enumerate(profile.tokens)) / sum(profile.tokens)
    assert profile.mean_length() == pytest.approx(weighted)


def test_lengths_of_one_logit_are_its_own(random_case):
    graph = Graph.from_dense(**random_case(3))  # four logits
    each = [length_profile(graph, logit) for logit in range(graph.n_logits)]
    share = graph.logit_probs.double() / graph.logit_probs.double().sum()
    together = share @ torch.tensor([one.tokens for one in each], dtype=torch.float64)
    assert together.tolist() == pytest.approx(length_profile(graph).tokens)
    assert each[0].tokens != pytest.approx(each[1].tokens)
    with pytest.raises(ValueError, match="logit: expected a number from 0 to 3, got 4"):
        length_profile(graph, 4)


def test_lengths_count_what_is_not_stored(by_hand):
    small = by_hand().prune(1.0, 0.5)
    profile = length_profile(small)
    assert sum(profile.missing) > 0.1
    assert sum(profile.tokens) + sum(profile.errors) + sum(profile.missing) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_influence_past_a_set_is_that_of_all_paths_past_it(random_case, seed):
    graph = _small(random_case, seed)
    avoided = {0, 2, graph.error_slice.start}
    tokens = range(graph.token_slice.start, graph.token_slice.stop)
    for logit in range(graph.n_logits):
        found = influence_avoiding(graph, avoided, logit)
        for token in tokens:
            paths = _every_path(graph, logit, {token})
            wanted = sum(strength for nodes, strength in paths.items() if not avoided & set(nodes))
            assert math.isclose(found[token], wanted, rel_tol=1e3 * EPS, abs_tol=1e-300)
        assert not found[list(avoided)].any()
    weighted = sum(
        float(p) * influence_avoiding(graph, avoided, at) for at, p in enumerate(graph.logit_probs)
    )
    np.testing.assert_allclose(influence_avoiding(graph, avoided), weighted, rtol=1e3 * EPS)
    np.testing.assert_allclose(influence_avoiding(graph, []), graph.influence().numpy(), rtol=1e3 * EPS)


# Mechanism


def test_shares_by_hand(by_hand):
    """Paths: logit <- b (3/4) <- a (1/2) | error (1/4) | token (1/4); logit <- a (1/4); a <- tokens only."""
    graph = by_hand()
    found = mechanism(graph, [1])
    tokens = 0.25 + 0.75 * (0.5 + 0.25)
    assert found.multi_hop == pytest.approx(1 - 0.25 / tokens)
    assert found.unexplained == pytest.approx(1 - tokens)
    assert (found.direct, found.concepts) == (0.0, 1)
    assert mechanism(graph, []).multi_hop == 0
    assert mechanism(graph, [0, 1]).multi_hop == 1


def test_direct_share_is_that_of_single_edges(by_hand):
    adjacency = by_hand().dense()
    adjacency[8, 7] = 4.0
    found = mechanism(by_hand(adjacency=adjacency), [])
    tokens = (4 + 1 + 3 * 0.75) / 8
    assert found.direct == pytest.approx(0.5 / tokens)


def test_no_influence_of_tokens_is_not_a_number(by_hand):
    adjacency = by_hand().dense()
    adjacency[:, 6:8] = 0
    assert math.isnan(mechanism(by_hand(adjacency=adjacency), [1]).multi_hop)


def test_report_takes_concepts_at_any_position(by_hand):
    graph = by_hand()
    assert concept_nodes(graph, {(1, 7), (0, 9)}) == [1]
    assert concept_features(graph, [1, 5, 8]) == {(1, 7)}
    report = mechanism_report(iter([graph, graph.prune(1, 1)]), {(1, 7)})
    assert [one.concepts for one in report.prompts] == [1, 1]
    assert report.low == pytest.approx(report.multi_hop) == pytest.approx(report.high)
    assert report.to_dict()["prompts"][0]["multi_hop"] == report.prompts[0].multi_hop
    with pytest.raises(ValueError, match="graphs: expected at least one"):
        mechanism_report([], set())


def test_bootstrap_draws_whole_clusters():
    counts = bootstrap_draws(["a", "b", "a", "c"], 200, seed=3)
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()
    assert (counts != bootstrap_draws(["a", "b", "a", "c"], 200, seed=4)).any()


def test_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.normal(1.0, 1.0, 60), resamples=400, seed=trial)
        hits += low <= 1.0 <= high
    assert (
        0.88 <= hits / 200 <= 0.99
    )  # 0.95 less what a percentile interval of 60 draws gives away; +- 3 sigma
    wide = bootstrap_interval([0, 0, 0, 1, 1, 1], clusters="aaabbb")
    assert wide == (0.0, 1.0)
    assert all(math.isnan(end) for end in bootstrap_interval([math.nan]))
    with pytest.raises(ValueError, match="clusters: expected 2 labels, got 1"):
        bootstrap_interval([1, 2], clusters="a")
