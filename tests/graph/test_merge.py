"""Supernodes: edges against the frontend's rule on dense matrices, the loss by its definition, bounds, files."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fasttc.graph import Graph, MergeBounds, MergedGraph, PrunedGraph, Supernodes, load_graph, merge, merge_by
from fasttc.graph.merged import merged_graph
from fasttc.graph.quotient import MergeLoss, edges_of, merge_loss

EPS = float(np.finfo(np.float64).eps)


def _merged(random_case, seed: int, groups: int = 4) -> MergedGraph:
    """A pruned random graph with features in random groups, so that everything occurs: cycles, cancellation."""
    pruned = Graph.from_dense(**random_case(seed)).prune(0.9, 0.9).compact()
    generator = np.random.default_rng(seed)
    ids = merge(pruned, supernodes=10**6).supernodes().groups
    assert ids == {}  # nothing was merged
    group = np.where(pruned.node_mask.numpy(), np.arange(pruned.graph.n_nodes), -1)
    group[pruned.graph.feature_slice] = 10**6 + generator.integers(groups, size=pruned.graph.n_features)
    return merged_graph(pruned, group)


def _frontend(merged: MergedGraph) -> torch.Tensor:
    """The rule of init-cg-subgraph.js, loop by loop, with what pruning dropped as more outside input."""
    graph, members = merged.pruned.graph, merged.members()
    dense = torch.where(merged.pruned.dense_mask(), graph.dense(), 0.0)
    edges = torch.zeros(len(members), len(members), dtype=torch.float64)
    for number, targets in enumerate(members):
        outside, fraction = {}, {}
        for t in targets:
            inside = float(dense[t, targets].abs().sum())
            outside[t] = float(dense[t].abs().sum()) - inside + float(graph.remainder[t])
            fraction[t] = outside[t] / (outside[t] + inside) if outside[t] + inside > 0 else 0.0
        for other, sources in enumerate(members):
            for t in targets if other != number and sum(fraction.values()) > 0 else []:
                if outside[t] > 0:
                    share = fraction[t] / sum(fraction.values())
                    edges[number, other] += share * float(dense[t, sources].sum()) / outside[t]
    return edges


def _dense(merged: MergedGraph, meaning) -> torch.Tensor:
    matrix = torch.zeros(merged.n_nodes, merged.n_nodes, dtype=torch.float64)
    targets, sources, weights = merged.edges(meaning)
    matrix[targets, sources] = weights
    return matrix


@pytest.mark.parametrize("seed", range(4))
def test_normalised_edges_are_the_frontends(random_case, seed):
    merged = _merged(random_case, seed)
    torch.testing.assert_close(
        _dense(merged, "normalised"), _frontend(merged), rtol=1e3 * EPS, atol=1e2 * EPS
    )
    assert float(_dense(merged, "normalised").abs().sum(1).max()) <= 1 + 1e2 * EPS


@pytest.mark.parametrize("seed", range(2))
def test_additive_edges_add_up(random_case, seed):
    merged = _merged(random_case, seed)
    members, dense = merged.members(), merged.pruned.graph.dense()
    found = _dense(merged, "additive")
    for target, source in found.nonzero().tolist():
        wanted = float(dense[members[target]][:, members[source]].sum())
        assert math.isclose(float(found[target, source]), wanted, rel_tol=1e4 * EPS, abs_tol=1e4 * EPS)
    with pytest.raises(ValueError, match="meaning: expected 'normalised' or 'additive', got 'raw'"):
        merged.edges("raw")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_loss_by_its_definition(random_case, seed):
    merged = _merged(random_case, seed)
    graph, members, loss = merged.pruned.graph, merged.members(), merged.loss
    shares = _dense(merged, "normalised").abs()
    probability = torch.zeros(graph.n_nodes, dtype=torch.float64)
    probability[graph.logit_slice] = graph.logit_probs.double()
    start = torch.stack([probability[nodes].sum() for nodes in members])
    visited = torch.linalg.solve((torch.eye(len(members)) - shares).T.double(), start)
    torch.testing.assert_close(merged.influence(), visited - start, rtol=1e-9, atol=1e-11)
    kinds = [int(graph.node_kind[m[0]]) for m in members]
    lost = sum(float(visited[i] * (1 - shares[i].sum())) for i in range(len(members)) if kinds[i] in (0, 3))
    errors = sum(float(visited[i]) for i in range(len(members)) if kinds[i] == 1)
    rows = sum(float(visited[i]) for i in range(len(members)) if kinds[i] in (0, 3))
    assert loss.merged.completeness == pytest.approx(1 - (errors + lost) / (float(visited.sum()) + lost))
    assert loss.merged.completeness_rows == pytest.approx(1 - (errors + lost) / rows)
    assert loss.completeness_kept == pytest.approx(loss.merged.completeness / loss.pruned.completeness)
    targets, sources, weights = (x.tolist() for x in merged.pruned.edges())
    group = merged.supernode.tolist()
    between = sum(abs(w) for t, s, w in zip(targets, sources, weights, strict=True) if group[t] != group[s])
    assert loss.edges_kept == pytest.approx(float(_dense(merged, "additive").abs().sum()) / between)
    assert loss.internal == pytest.approx(1 - between / sum(map(abs, weights)))
    assert 0.5 <= loss.sign_agreement < 1
    assert loss.sign_agreement == pytest.approx(_agreement(merged))
    assert 0 < loss.influence_kept <= 1


def _agreement(merged: MergedGraph) -> float:
    group = merged.supernode.tolist()
    size = [len(m) for m in merged.members()]
    seen: dict[tuple[int, int, bool], list[float]] = {}
    for t, s, w in zip(*(x.tolist() for x in merged.pruned.edges()), strict=True):
        if group[t] != group[s]:
            if size[group[s]] > 1:
                seen.setdefault((group[s], t, True), []).append(w)
            if size[group[t]] > 1:
                seen.setdefault((group[t], s, False), []).append(w)
    shared = [weights for weights in seen.values() if len(weights) > 1]
    agreed = sum(max(sum(w for w in ws if w > 0), -sum(w for w in ws if w < 0)) for ws in shared)
    return agreed / sum(abs(w) for ws in shared for w in ws)


def test_nodes_without_an_edge_count_neither_before_nor_after(by_hand):
    pruned = by_hand(adjacency=by_hand().dense().index_fill(1, torch.tensor([6]), 0)).prune(
        1, 1
    )  # not the first token
    assert pruned.node_mask[6]
    merged = merge(pruned, supernodes=10**6)
    assert merged.loss.nodes_before == merged.loss.nodes_after == pruned.n_nodes - 1
    made = Supernodes(groups={"tokens": ("E_11_0", "E_12_1")})  # but a file may put it into a group
    loss = merge_by(pruned, made)[0].loss
    assert (loss.nodes_before, loss.nodes_after) == (pruned.n_nodes, pruned.n_nodes - 1)


def test_merging_nothing_loses_nothing(random_case):
    pruned = Graph.from_dense(**random_case(1)).prune()
    loss = merge(pruned, supernodes=10**6).loss
    assert loss.merged == pytest.approx(pruned.scores())
    assert (loss.sign_agreement, loss.edges_kept, loss.internal) == (1.0, 1.0, 0.0)
    assert loss.influence_kept == pytest.approx(1) == pytest.approx(loss.completeness_kept)


def _twins(sign: float, position: int = 1) -> Graph:
    """Two features with the same inputs and outputs up to a sign, and a third that differs."""
    features = torch.tensor([[0, 0, 1], [0, position, 2], [0, 1, 3]])
    adjacency = torch.zeros(3 + 2 + 2 + 1, 8, dtype=torch.float64)
    adjacency[7, :3] = torch.tensor([2.0, 2.0 * sign, 1.0])
    adjacency[0, 5:7], adjacency[1, 5:7] = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    adjacency[2, 5:7] = torch.tensor([3.0, -1.0])
    return Graph.from_dense(
        adjacency, features=features, activations=torch.ones(3), input_ids=[1, 2], logit_ids=[3], logit_probs=[1.0]
    )  # fmt: skip


def test_twins_merge_and_opposites_do_not():
    pruned = _twins(1.0).prune(1, 1)
    merged = merge(pruned, supernodes=5)
    assert sorted(map(len, merged.members())) == [1, 1, 1, 1, 2]
    assert [0, 1] in merged.members()
    assert merged.names[0] == "L0 2 features at 1 2"
    against = merge(_twins(-1.0).prune(1, 1), supernodes=5)
    assert [0, 1] not in against.members()


def test_evidence_decides_between_equals():
    pruned = _twins(1.0).prune(1, 1).compact()
    rows = np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert [0, 2] in merge(pruned, supernodes=5, evidence=[rows] * 6).members()
    with pytest.raises(ValueError, match=r"evidence: expected arrays \[3, any\].* got shape \[2, 2\] at 0"):
        merge(pruned, evidence=[rows[:2]])
    with pytest.raises(ValueError, match="evidence: expected finite numbers, got others in array 0"):
        merge(pruned, evidence=[rows * np.nan])


def within(bounds: MergeBounds, loss: MergeLoss) -> bool:
    """By the figures of the whole measured loss."""
    return (
        loss.completeness_kept >= bounds.completeness
        and loss.sign_agreement >= bounds.sign_agreement
        and loss.edges_kept >= bounds.edges
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bounds", [MergeBounds(), MergeBounds(0.97, 0.95, 0.95), MergeBounds(0, 0, 0)])
def test_result_is_within_the_bounds_and_repeatable(random_case, seed, bounds):
    graph = Graph.from_dense(**random_case(seed, n_tokens=6))
    merged = merge(graph, bounds=bounds)
    assert within(bounds, merged.loss) or merged.n_nodes == len(merge(graph, supernodes=10**6).names)
    assert torch.equal(merge(graph, bounds=bounds).supernode, merged.supernode)
    for members in merged.members():
        kinds = {int(merged.pruned.graph.node_kind[n]) for n in members}
        assert len(kinds) == 1
        assert kinds != {3} or len(members) == 1
    if bounds.completeness == 0:
        assert merged.n_nodes < merge(graph, bounds=MergeBounds(0.99, 0.99, 0.99)).n_nodes


def test_refuses_impossible_requests(by_hand):
    with pytest.raises(ValueError, match="supernodes: expected at least 1, got 0"):
        merge(by_hand(), supernodes=0)
    with pytest.raises(ValueError, match="sign_agreement: expected a share from 0 to 1, got 2"):
        MergeBounds(sign_agreement=2)


# Files


def test_file_gives_back_what_was_saved(random_case, tmp_path):
    merged = merge(Graph.from_dense(**random_case(2)).prune(0.9))
    merged.save(tmp_path / "m.graph")
    loaded = load_graph(tmp_path / "m.graph")
    assert isinstance(loaded, MergedGraph)
    assert torch.equal(loaded.supernode, merged.supernode)
    assert (loaded.names, loaded.loss) == (merged.names, merged.loss)
    assert PrunedGraph.load(tmp_path / "m.graph").n_nodes == merged.pruned.n_nodes
    assert Graph.load(tmp_path / "m.graph").n_edges == merged.pruned.n_edges
    merged.pruned.save(tmp_path / "p.graph")
    with pytest.raises(ValueError, match="expected a merged graph, got a graph that was not merged"):
        MergedGraph.load(tmp_path / "p.graph")


def test_broken_files_are_named(random_case, tmp_path):
    merged = merge(Graph.from_dense(**random_case(2)).prune(0.9))
    broken = object.__new__(MergedGraph)
    for name, value in {"pruned": merged.pruned, "supernode": merged.supernode, "names": ["a"]}.items():
        object.__setattr__(broken, name, value)
    broken.save(tmp_path / "b.graph")
    with pytest.raises(ValueError, match=r"b\.graph: broken graph file: names: expected a different one"):
        load_graph(tmp_path / "b.graph")


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_a_file_are_applied(random_case, seed):
    merged = merge(Graph.from_dense(**random_case(seed)).prune(0.95))
    made = merged.supernodes()
    assert made.groups
    again, missing = merge_by(merged.pruned, made)
    assert (missing, again.names, again.loss) == ([], merged.names, merged.loss)
    renamed = Supernodes(groups={"mine": (*next(iter(made.groups.values())), "9_9_9")})
    one, missing = merge_by(merged.pruned, renamed)
    assert missing == ["9_9_9"]
    assert "mine" in one.names
    assert one.supernodes().groups == {"mine": next(iter(made.groups.values()))}


def test_a_group_of_the_whole_graph_names_the_same_nodes_in_the_pruned_one(by_hand):
    adjacency = by_hand().dense()
    adjacency[8, 5], adjacency[8, 0], adjacency[1, 0] = (
        5.0,
        0.01,
        0.01,
    )  # the error of layer 1 matters, feature 0_1_1 not
    graph = by_hand(adjacency=adjacency, features=torch.tensor([[0, 1, 1], [1, 1, 7]]))
    made = Supernodes(groups={"errors": ("0_0_1_error", "0_1_1_error"), "feature": ("0_1_1",)})
    whole, missing = merge_by(graph.prune(1, 1), made)
    assert (missing, whole.supernodes().groups["errors"]) == ([], made.groups["errors"])
    pruned, missing = merge_by(graph.prune(0.9, 1), made)
    assert missing == ["0_1_1"]
    assert pruned.supernodes().groups == {"errors": made.groups["errors"]}


def test_groups_that_cannot_be(by_hand):
    with pytest.raises(ValueError, match="groups: expected nodes of this graph, got none of it"):
        merge_by(by_hand(), Supernodes(groups={"a": ("7_7_7",)}))
    with pytest.raises(ValueError, match="expected errors apart from other nodes, got both in 'a'"):
        merge_by(by_hand().prune(1, 1), Supernodes(groups={"a": ("0_5_1", "0_0_1_error")}))
    with pytest.raises(ValueError, match="supernode: expected 9 entries"):
        replace(merge(by_hand()), supernode=torch.zeros(3, dtype=torch.int64))


def test_group_that_holds_everything_explains_nothing(random_case):
    pruned = Graph.from_dense(**random_case(0)).prune(0.9).compact()
    edges = edges_of(pruned)
    group = np.where(pruned.graph.node_kind.numpy() == 1, 1, 0)
    loss = merge_loss(edges, group, pruned.scores())
    assert loss.nodes_after == 2
    assert not within(MergeBounds(), loss)
    assert not MergeBounds().met(edges, group, pruned.scores())


def test_merging_goes_on_elsewhere_where_a_cut_would_end(random_case):
    """Never more supernodes than the best cut of the tree has, sometimes fewer, and within the bounds all the same."""
    bounds, fewer = MergeBounds(completeness=0.8, sign_agreement=0.8, edges=0.7), 0
    for seed in range(6):
        pruned = Graph.from_dense(**random_case(seed)).prune(0.9, 0.9).compact()
        merged = merge(pruned, bounds=bounds)
        assert within(bounds, merged.loss)
        cuts = [merge(pruned, supernodes=count) for count in range(1, pruned.n_nodes)]
        best = min((cut.n_nodes for cut in cuts if within(bounds, cut.loss)), default=pruned.n_nodes)
        assert merged.n_nodes <= best
        fewer += merged.n_nodes < best
    assert fewer > 0
