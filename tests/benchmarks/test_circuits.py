"""What the circuit benchmark computes itself: AUC, its clustered bound, random merges, verdicts."""

import numpy as np
import pytest

from fasttc.benchmarks.circuits.scale import large_graph
from fasttc.benchmarks.circuits.suite import auc, clustered_bound, judge, notes, random_loss
from fasttc.graph import merge


def test_auc_by_hand():
    assert auc([2, 3], [0, 1]) == 1.0
    assert auc([0, 1], [2, 3]) == 0.0
    assert auc([1, 1], [1, 1]) == 0.5
    assert auc([1, 3], [2, 0]) == 0.75
    assert auc([1, 3], [2, 0], np.array([0, 1]), np.array([1, 1])) == 1.0  # the first is never drawn


def test_bound_is_lower_where_prompts_of_a_drug_stand_together():
    generator = np.random.default_rng(0)
    of_drug = np.repeat(generator.normal(0.8, 1.0, 6), 10)
    low = generator.normal(0.0, 1.0, 60)
    own = [str(i) for i in range(60)]
    drugs = [str(i // 10) for i in range(60)]
    alone, together = (
        clustered_bound(of_drug, low, [labels, own], seed=1, draws=400) for labels in (own, drugs)
    )
    assert together < alone < auc(of_drug, low)


def test_random_merges_have_the_same_sizes_and_lose_more():
    merged = merge(large_graph(760, 4000, 0).prune(0.9))
    losses = random_loss(merged, 0)
    assert {loss.nodes_after for loss in losses} == {merged.n_nodes}
    assert {loss.nodes_before for loss in losses} == {merged.loss.nodes_before}
    assert np.mean([loss.edges_kept for loss in losses]) < merged.loss.edges_kept


def test_large_graph_is_what_was_asked_for():
    graph = large_graph(1000, 20_000, 3)
    assert graph.n_nodes == 1000
    assert graph.n_edges == pytest.approx(20_000, rel=0.15)  # rows low down have fewer possible sources


def test_verdicts_name_what_was_missed():
    better = {f"{name}_above_random": 1.0 for name in ("completeness_kept", "sign_agreement", "edges_kept")}
    row = {
        "node_threshold": 0.95,
        "times_fewer": 4.0,
        "completeness_kept": 0.9,
        "completeness_kept_random": 0.8,
    }
    row |= {
        "sign_agreement": 0.95,
        "sign_agreement_random": 0.99,
        "edges_kept": 0.85,
        "edges_kept_random": 0.6,
    }
    result = {
        "mechanism": {"prompts": 200, "drugs": [12, 12], "auc": 0.95, "auc_low": 0.7},
        "merging": [{**row, **better}],
        "diff": {"features": [], "drop": 1.0, "drop_random_95": 0.1},
        "scale": [{"operation": "merge", "nodes": 10, "edges": 9, "seconds": 11.0, "bytes": 1}],
    }
    unjudged = {"node_threshold": 0.8, "nodes": 26.1, "times_fewer": 4.788, "completeness_kept": 0.93}
    result["merging"].append(unjudged)
    shown = "pruned at 0.8 (26 nodes), 4.79 times fewer, completeness_kept 0.930"
    assert notes(result) == [f"note: one target, {shown}"]
    result["merging_default_targets"] = [unjudged]
    assert notes(result) == [f"note: one target, {shown}", f"note: default targets, {shown}"]
    missed = [text for text in judge(result) if text.startswith("missed: ")]
    assert len(missed) == 5
    for words in (
        "its lower 95 % bound",
        "4.00 times fewer",
        "sign_agreement 0.950",
        "the 0 named",
        "merge of 10",
    ):
        assert any(words in text for text in missed)
