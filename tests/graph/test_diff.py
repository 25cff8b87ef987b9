"""Changes between two graphs against their dense matrices; significance against planted effects."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fasttc.graph import Graph, Supernodes, diff, feature_changes, node_ids, strongest_paths
from fasttc.graph.joint import joint_json


def _pair(by_hand) -> tuple[Graph, Graph]:
    """Feature b = (1, 1, 7) makes way for c = (1, 1, 9); a grows."""
    base = by_hand()
    adjacency = base.dense()
    adjacency[8, 0] = -5.0
    return base, by_hand(adjacency=adjacency, features=torch.tensor([[0, 1, 5], [1, 1, 9]]))


def test_a_graph_does_not_differ_from_itself(random_case):
    graph = Graph.from_dense(**random_case(1))
    found = diff(graph, graph, supernodes=Supernodes(groups={"a": (node_ids(graph)[0],)}))
    for changes in (found.nodes, found.edges, found.paths, found.supernodes):
        assert changes
        assert all(change.status == "kept" and change.change == 0 for change in changes)


def test_statuses_and_influence_by_hand(by_hand):
    base, tuned = _pair(by_hand)
    found = {change.key[0]: change for change in diff(base, tuned).nodes}
    assert {key: found[key].status for key in ("0_5_1", "1_7_1", "1_9_1", "3_42_1")} == {
        "0_5_1": "strengthened",
        "1_7_1": "lost",
        "1_9_1": "gained",
        "3_42_1": "kept",
    }
    # a: directly 1/4 and through b 3/4 * 1/2; then 5/8 and 3/8 * 1/2. Per probability of the logit.
    assert found["0_5_1"].base == pytest.approx(0.25 + 0.375)
    assert found["0_5_1"].tuned == pytest.approx(0.625 + 0.1875)
    assert (found["1_7_1"].base, found["1_7_1"].tuned) == (pytest.approx(0.75), 0.0)
    assert found["3_42_1"].base == found["3_42_1"].tuned == 1.0
    assert found["0_5_1"].feature == (0, 5)
    assert found["3_42_1"].feature is None
    changes = diff(base, tuned)
    assert changes.features("gained") == [(1, 9)]
    assert changes.features("gained", "lost") == [(1, 7), (1, 9)]
    assert [abs(change.change) for change in changes.nodes] == sorted(
        (abs(change.change) for change in changes.nodes), reverse=True
    )
    back = {change.key[0]: change.status for change in diff(tuned, base).nodes}
    assert (back["1_7_1"], back["1_9_1"], back["0_5_1"]) == ("gained", "lost", "weakened")
    assert diff(base, tuned, least_change=2.0).features("gained", "lost", "strengthened") == []


@pytest.mark.parametrize("seed", range(3))
def test_edges_and_nodes_are_looked_up_in_the_whole_graphs(random_case, seed):
    case = random_case(seed)
    base = Graph.from_dense(**case)
    generator = torch.Generator().manual_seed(seed)
    noise = 0.5 + torch.rand(case["adjacency"].shape, generator=generator, dtype=torch.float64)
    tuned = Graph.from_dense(**{**case, "adjacency": case["adjacency"] * noise})
    found = diff(base, tuned, least_change=0)
    number = {node_id: node for node, node_id in enumerate(node_ids(base))}
    for change in found.nodes:
        for side, value in ((base, change.base), (tuned, change.tuned)):
            assert value == pytest.approx(float(_visited(side)[number[change.key[0]]]))
    masks = [graph.prune().dense_mask() for graph in (base, tuned)]
    assert len(found.edges) == int((masks[0] | masks[1]).sum())
    for change in found.edges:
        source, target = (number[key] for key in change.key)
        for side, value in ((base, change.base), (tuned, change.tuned)):
            share = side.dense()[target].abs() / side.dense()[target].abs().sum()
            assert value == pytest.approx(float(share[source] * _visited(side)[target]))
    total = float(base.logit_probs.sum())
    for graph, name in ((base, "base"), (tuned, "tuned")):
        strengths = {change.key: getattr(change, name) for change in found.paths}
        for path in strongest_paths(graph, 10):
            key = tuple(node_ids(graph)[node] for node in path.nodes)
            assert strengths[key] == pytest.approx(path.strength * float(graph.logit_probs[0]) / total)


def _visited(graph: Graph) -> torch.Tensor:
    visited = graph.influence()
    visited[graph.logit_slice] += graph.logit_probs.double()
    return visited / graph.logit_probs.double().sum()


def test_supernodes_compare_what_enters_them(by_hand):
    base, tuned = _pair(by_hand)
    made = [{"both": ("0_5_1", "1_7_1", "1_9_1")}, {"a": ("0_5_1",)}]
    found = {
        change.name: change
        for groups in made
        for change in diff(base, tuned, supernodes=Supernodes(groups=groups)).supernodes
    }
    assert (found["both"].base, found["both"].tuned) == (pytest.approx(1), pytest.approx(1))
    assert found["both"].status == "kept"
    assert found["a"].tuned == pytest.approx(0.8125)
    assert found["both"].key == ("0_5_1", "1_7_1", "1_9_1")


def test_features_that_did_not_carry_over_are_not_matched(by_hand):
    base, tuned = _pair(by_hand)
    found = diff(base, tuned, carried={(1, 7), (1, 9)})
    of_a = [change for change in found.nodes if change.key == ("0_5_1",)]
    assert {(change.status, change.trusted) for change in of_a} == {("lost", False), ("gained", False)}
    assert all(change.trusted for change in found.nodes if change.key != ("0_5_1",))
    assert any(not change.trusted for change in found.edges)
    assert any(not change.trusted for change in found.paths)


def test_refuses_graphs_that_cannot_be_compared(by_hand):
    with pytest.raises(ValueError, match="tuned: expected the graph of the same prompt, got other tokens"):
        diff(by_hand(), by_hand(input_ids=torch.tensor([11, 13])))
    with pytest.raises(ValueError, match="tuned: expected the graph of the same prompt"):
        joint_json(by_hand(), by_hand(tokens=["x", "y"]), slug="s")
    deeper = Graph.from_dense(
        torch.zeros(9, 9), features=torch.zeros(0, 3, dtype=torch.int64), activations=[], n_layers=3,
        input_ids=[11, 12], logit_ids=[42], logit_probs=[0.5],
    )  # fmt: skip
    with pytest.raises(ValueError, match="tuned: expected 2 layers as in base, got 3"):
        diff(by_hand(), deeper)
    with pytest.raises(ValueError, match="paths, least_change: expected numbers >= 0, got -1 and"):
        diff(by_hand(), by_hand(), paths=-1)
    assert diff(by_hand(), by_hand(), paths=0).paths == []


def test_joint_graph_has_owners(by_hand):
    base, tuned = _pair(by_hand)
    content = joint_json(base.prune(1, 1), tuned.prune(1, 1), slug="s")
    owners = {node["node_id"]: node["owner"] for node in content["nodes"]}
    assert (owners["1_7_1"], owners["1_9_1"], owners["0_5_1"]) == ("base", "tuned", "both")
    links = {(link["source"], link["target"]): link for link in content["links"]}
    assert links["0_5_1", "3_42_1"]["weight"] == -5.0
    assert links["0_5_1", "3_42_1"]["weight_base"] == -1.0
    assert links["1_7_1", "3_42_1"]["owner"] == "base"
    apart = joint_json(base.prune(1, 1), tuned.prune(1, 1), slug="s", carried=set())
    owners = {node["node_id"]: node["owner"] for node in apart["nodes"]}
    assert (owners["0_5_1_base"], owners["0_5_1"]) == ("base", "tuned")
    assert all({link["source"], link["target"]} <= set(owners) for link in apart["links"])


def test_an_error_of_one_graph_is_not_a_feature_of_the_other(by_hand):
    """circuit-tracer calls the base's error of layer 1 and the fine-tuned model's feature 1 of layer 0 both 0_1_1."""
    adjacency = by_hand().dense()
    adjacency[8, 5] = 2.0
    base = by_hand(adjacency=adjacency)
    tuned = by_hand(features=torch.tensor([[0, 1, 1], [1, 1, 7]]))
    content = joint_json(base.prune(1, 1), tuned.prune(1, 1), slug="s")
    found = {node["node_id"]: (node["owner"], node["feature_type"]) for node in content["nodes"]}
    assert found["0_1_1"] == ("tuned", "cross layer transcoder")
    assert found["0_1_1_error"] == ("base", "mlp reconstruction error")
    assert {link["source"] for link in content["links"] if link["weight"] == 2.0} >= {"0_1_1_error"}
    group = Supernodes(groups={"error": ("0_1_1_error",), "feature": ("0_1_1",)})
    entered = {
        change.name: (change.base, change.tuned) for change in diff(base, tuned, supernodes=group).supernodes
    }
    assert entered["error"] == (pytest.approx(2 / 6), 0.0)
    assert entered["feature"] == (0.0, pytest.approx(0.625))
    split = diff(base, base, supernodes=Supernodes(groups={"a": ("0_5_1",)}), carried=set())
    assert split.supernodes[0].key == ("0_5_1",)  # the feature of either model, once


# Significance


def _prompts(by_hand, effect: float, n: int = 12) -> list[tuple[Graph, Graph]]:
    """Pairs of graphs in which b's part of the logit goes from 3/4 up by ``effect`` with noise, at a's cost."""
    generator, pairs = np.random.default_rng(0), []
    for _ in range(n):
        graphs = []
        for shift in (0.0, effect):
            share = 0.5 + shift + 0.1 * generator.standard_normal()
            adjacency = by_hand().dense()
            adjacency[8, 1], adjacency[8, 0] = 4 * share, -4 * (1 - share)
            graphs.append(by_hand(adjacency=adjacency))
        pairs.append((graphs[0], graphs[1]))
    return pairs


def test_finds_a_planted_change(by_hand):
    found = {one.feature: one for one in feature_changes(iter(_prompts(by_hand, 0.3)))}
    assert found[1, 7].q <= 0.01
    assert found[1, 7].change == pytest.approx(0.3, abs=0.1)
    assert (found[1, 7].in_base, found[1, 7].in_tuned) == (1.0, 1.0)
    assert found[1, 7].p >= 1 / 5000
    assert found[1, 7].q >= found[1, 7].p


def test_a_feature_that_did_not_carry_over_is_lost_and_gained(by_hand):
    pairs = _prompts(by_hand, 0.3)
    found = {one.feature: one for one in feature_changes(pairs)}
    parts = feature_changes(pairs, carried={(0, 5)})
    (kept,) = [one for one in parts if one.feature == (0, 5)]
    assert (kept.trusted, kept.p, kept.change) == (True, found[0, 5].p, found[0, 5].change)
    lost, gained = sorted((one for one in parts if one.feature == (1, 7)), key=lambda one: one.tuned)
    whole = found[1, 7]
    assert (lost.base, lost.tuned, lost.in_base, lost.in_tuned) == (whole.base, 0, 1, 0)
    assert (gained.base, gained.tuned, gained.in_base, gained.in_tuned) == (0, whole.tuned, 0, 1)
    assert not lost.trusted
    assert not gained.trusted
    assert max(lost.p, gained.p) <= 0.01  # 12 prompts agree in sign
    adapted = [tuple(replace(graph, metadata={"adapters_from": [9, 7]}) for graph in pair) for pair in pairs]
    assert [one.trusted for one in feature_changes(adapted, carried=set()) if one.feature == (1, 7)] == [True]


def test_finds_no_change_where_there_is_none(by_hand):
    assert all(one.p > 0.05 for one in feature_changes(_prompts(by_hand, 0.0)))
    same = [(graph, graph) for graph, _ in _prompts(by_hand, 0.0)]
    assert all(one.p == 1 and one.change == 0 for one in feature_changes(same, flips=99))


def test_smallest_p_is_that_of_all_patterns(by_hand):
    """With 3 prompts that agree, 2 of 8 patterns are as far as the one seen."""
    pairs = _prompts(by_hand, 0.45, 3)
    (b,) = [one for one in feature_changes(pairs, flips=9999) if one.feature == (1, 7)]
    assert b.p == pytest.approx(0.25, abs=0.02)  # 9,999 patterns: 4 standard errors
    with pytest.raises(ValueError, match="pairs: expected at least one prompt"):
        feature_changes([])
