"""The page in a real browser computes what Python does: pruning, scores, paths, edges of groups."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fasttc.benchmarks.page.speed import random_graph
from fasttc.graph import Graph

from .reader import element, features, js


def assert_prunes_alike(driver: Any, graph: Graph, node_share: float, edge_share: float) -> None:
    script = """
    const graph = fasttc.app.graphs[0], pruned = fasttc.graph.prune(graph, arguments[0], arguments[1]);
    const kept = fasttc.graph.prunedScores(graph, pruned);
    return [Array.from(pruned.nodes), Array.from(pruned.edges), Array.from(graph.influence),
            [kept.replacement, kept.completeness, kept.completeness_rows]];
    """
    nodes, edges, influence, scores = js(driver, script, node_share, edge_share)
    expected = graph.prune(node_share, edge_share)
    assert nodes == expected.node_mask.int().tolist()
    assert edges == expected.edge_mask.int().tolist()
    # Both add in float64 and nearly in the same order: what is left is rounding of sums of at most n terms.
    room = graph.n_nodes * torch.finfo(torch.float64).eps
    assert torch.tensor(influence, dtype=torch.float64).sub(expected.influence).abs().max() <= room
    assert scores == pytest.approx(list(expected.scores()), rel=0, abs=room)


@pytest.mark.parametrize(
    ("node_share", "edge_share"), [(0.8, 0.98), (0.3, 0.6), (0.95, 0.999), (1.0, 1.0), (0.0, 0.0)]
)
def test_pruning_is_that_of_python(driver, show, small, node_share, edge_share):
    show(small)
    assert_prunes_alike(driver, small, node_share, edge_share)


def test_pruning_of_a_part_counts_what_is_missing(driver, show, small):
    part = small.prune(0.9, 0.9).subgraph()
    assert bool((part.remainder > 0).any())
    show(part)
    assert_prunes_alike(driver, part, 0.8, 0.95)


def test_pruning_of_a_graph_of_real_size(driver, show):
    graph = random_graph(500, layers=6, tokens=14, inputs=110)
    assert graph.n_edges > 40_000
    show(graph)
    assert_prunes_alike(driver, graph, 0.8, 0.98)
    shown = json.loads(element(driver, "#scores").get_attribute("data-kept"))
    expected = graph.prune()
    assert (shown["nodes"], shown["edges"]) == (expected.n_nodes, expected.n_edges)
    assert shown["completeness"] == pytest.approx(expected.scores().completeness)


def test_pruning_of_circuit_tracers_graphs(driver, show, shared_data):
    from safetensors.torch import load_file

    tensors = load_file(shared_data / "oracle" / "gemma2_jumprelu" / "ct_graph_f64.safetensors")
    graph = Graph.from_dense(
        tensors["adjacency"],
        features=tensors["active_features"],
        activations=tensors["activation_values"],
        input_ids=tensors["input_tokens"],
        logit_ids=tensors["logit_token_ids"],
        logit_probs=tensors["logit_probabilities"],
    )
    show(graph)
    for shares in ((0.8, 0.98), (0.6, 0.9)):
        assert_prunes_alike(driver, graph, *shares)


def test_paths_are_the_strongest_there_are(driver, show, small):
    show(small)
    js(driver, "fasttc.app.setShares([1, 1])")
    key = features(driver, 1)[0]
    script = """
    const scene = fasttc.app.scene, node = scene.byKey.get(arguments[0]);
    return [fasttc.paths.through(scene, node.index, 5).map((p) => p.strength), node.index,
            scene.edges.map((e) => [e.source, e.target, e.share]), scene.nodes.map((n) => [n.kind, n.probability])];
    """
    found, through, edges, nodes = js(driver, script, key)
    outputs: dict[int, list[tuple[int, float]]] = {}
    inputs: dict[int, list[tuple[int, float]]] = {}
    for source, target, share in edges:
        outputs.setdefault(source, []).append((target, abs(share)))
        inputs.setdefault(target, []).append((source, abs(share)))

    def ends(at: int, links: dict, worth: Callable[[int], float]) -> list[float]:
        own = [worth(at)] if worth(at) else []
        return own + [
            share * rest for other, share in links.get(at, []) for rest in ends(other, links, worth)
        ]

    below = ends(through, inputs, lambda at: float(nodes[at][0] in ("token", "error")))
    above = ends(through, outputs, lambda at: nodes[at][1])
    every = sorted((a * b for a in sorted(below)[-5:] for b in sorted(above)[-5:]), reverse=True)
    assert found == pytest.approx(every[:5], rel=1e-12)


def test_a_groups_edges_follow_the_frontends_rule(driver, show, small):
    """methods 6.6: outside fractions of the members, links within a group dropped."""
    show(small)
    js(driver, "fasttc.app.setShares([1, 1]); fasttc.state.group(arguments[0], 'both')", features(driver, 3))
    script = """
    const scene = fasttc.app.scene, table = fasttc.app.table, group = scene.byKey.get('group:both');
    return [group.members.map((row) => table.id[row]),
            scene.inputs[group.index].map((e) => [scene.nodes[e.source].key, e.share, e.weight])];
    """
    members, edges = js(driver, script)
    from fasttc.graph import node_ids

    ids = node_ids(small)
    own = [ids.index(member) for member in members]
    dense = small.dense().double()
    outside = dense.abs()[own].sum(1) - dense.abs()[own][:, own].sum(1)
    fraction = outside / dense.abs()[own].sum(1)
    fraction /= fraction.sum()
    assert len(edges) > 5
    for key, share, weight in edges:
        links = dense[own, ids.index(key)]
        assert share == pytest.approx(float((fraction * links / outside).sum()), rel=1e-9)
        assert weight == pytest.approx(float(links.sum()), rel=1e-9)
