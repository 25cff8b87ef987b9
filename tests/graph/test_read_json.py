"""Graph JSON read back: circuit-tracer's own files, and ours there and back."""

import json
import math

import numpy as np
import pytest
import torch

from fasttc.graph import Supernodes, graph_json, merge, node_ids, read_graph_json
from fasttc.graph.networks import to_networkx, write_network
from fasttc.graph.read_json import graph_from_json


def test_opens_the_reference_files(oracle, shared_data):
    (path,) = [
        p for p in (shared_data / "oracle" / oracle.name / "graph_json").glob("*.json") if "metadata" not in p.name
    ]  # fmt: skip
    pruned, state = read_graph_json(path)
    reference = oracle.graph("ct_graph").prune()
    ours, theirs = pruned.graph, reference.compact().graph
    assert torch.equal(ours.features, theirs.features)
    assert ours.logit_ids.tolist() == theirs.logit_ids.tolist()
    assert ours.input_ids.tolist() == theirs.input_ids.tolist()
    for mine, reference_edges in zip(pruned.edges(), reference.compact().edges(), strict=True):
        np.testing.assert_array_equal(mine.numpy(), reference_edges.numpy())
    assert torch.equal(pruned.node_mask, reference.compact().node_mask)
    assert state.groups == {}
    assert merge(pruned).n_nodes < pruned.n_nodes


@pytest.mark.parametrize("seed", range(3))
def test_there_and_back(random_case, by_hand, seed):
    from fasttc.graph import Graph

    graph = Graph.from_dense(
        **{**random_case(seed, torch.float32), "logit_labels": None}, tokens=["<b>", 'a"b', "", "é", "\n"]
    )
    pruned = graph.prune(0.9).compact()
    ids = node_ids(pruned.graph, pruned.node_mask)
    made = Supernodes(groups={"g": (ids[0],)}, pinned=(ids[0], ids[pruned.n_features]))  # a feature, an error
    content = json.loads(json.dumps(graph_json(pruned, slug="s", q_params=made.to_q_params())))
    back, state = graph_from_json(content)
    assert back.graph.tokens == graph.tokens
    assert back.graph.logit_labels == graph.logit_labels
    assert torch.equal(back.graph.features, pruned.graph.features)
    assert torch.equal(back.graph.activations, pruned.graph.activations)
    for mine, theirs in zip(back.edges(), pruned.edges(), strict=True):
        assert torch.equal(mine, theirs)
    assert (back.node_threshold, back.edge_threshold) == (0.9, 0.98)
    assert state == made
    again = graph_json(back, slug="s")
    assert again["links"] == content["links"]
    assert [node["node_id"] for node in again["nodes"]] == [node["node_id"] for node in content["nodes"]]


def _colliding(by_hand):
    """Feature 0 of layer 0 at position 1 and the error of layer 0 there, under circuit-tracer's ids."""
    adjacency = by_hand().dense()
    adjacency[8, 3] = 2.5
    graph = by_hand(adjacency=adjacency, features=torch.tensor([[0, 1, 0], [1, 1, 7]]))
    content = graph_json(graph.prune(1, 1), slug="s")
    text = json.dumps(content).replace("0_0_1_error", "0_0_1")
    return graph, json.loads(text)


def test_ids_that_two_nodes_have_are_told_apart(by_hand):
    graph, content = _colliding(by_hand)
    back, _ = graph_from_json(content)
    assert back.graph.dense()[8, 0] == -1.0
    assert back.graph.dense()[8, 3] == 2.5
    assert back.graph.metadata["ambiguous_links"] == 0
    content["links"] = [link for link in content["links"] if link["weight"] != 2.5]
    back, _ = graph_from_json(content)
    assert back.graph.dense()[8, 3] == 0
    assert back.graph.metadata["ambiguous_links"] == 1
    assert graph.n_nodes == back.graph.n_nodes


def test_features_without_a_readable_id_are_unpaired(by_hand):
    content = graph_json(by_hand().prune(1, 1), slug="s")
    text = json.dumps(content).replace('"1_7_1"', '"x"').replace('"0_5_1"', '"y"')
    back, _ = graph_from_json(json.loads(text))
    assert back.graph.features.tolist() == by_hand().features.tolist()
    assert all(math.isnan(score) for score in back.full_scores)


def _of(content, kind):
    """The file's first node of a kind."""
    return next(node for node in content["nodes"] if kind in node["feature_type"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("metadata"), "no entry 'metadata'"),
        (lambda c: c.update(nodes=[]), "nodes: expected at least one logit, got none"),
        (lambda c: c["nodes"].append(c["nodes"][0]), "nodes: expected every node once, got duplicates"),
        (lambda c: c["links"].append(c["links"][0]), "links: expected each once, got .* again"),
        (lambda c: c["links"][0].update(source="q"), "no entry 'q'"),
        (lambda c: c["nodes"][0].update(ctx_idx="q"), "invalid literal"),
        (lambda c: c.update(nodes=3), "not iterable"),
        (
            lambda c: _of(c, "error").update(ctx_idx=-2),
            r"positions \(ctx_idx\) from 0 to 1, got -2 of '0_0_1'",
        ),
        (lambda c: _of(c, "transcoder").update(ctx_idx=2), r"from 0 to 1, got 2 of '0_5_1'"),
        (lambda c: _of(c, "embedding").update(ctx_idx=2), r"from 0 to 1, got 2 of 'E_11_0'"),
        (lambda c: _of(c, "logit").update(ctx_idx=2), r"from 0 to 1, got 2 of '3_42_1'"),
        (
            lambda c: _of(c, "error").update(layer="2"),
            "layers from 0 to 1 below the logits', got 2 of '0_0_1'",
        ),
        (
            lambda c: _of(c, "transcoder").update(layer="-1"),
            "layers from 0 to 1 below the logits', got -1 of '0_5_1'",
        ),
    ],
)
def test_refuses_other_json_and_names_the_file(by_hand, tmp_path, change, message):
    content = graph_json(by_hand().prune(1, 1), slug="s")
    change(content)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        read_graph_json(path)
    assert str(caught.value).startswith(str(path))
    with pytest.raises(ValueError, match="there is no file of that name"):
        read_graph_json(tmp_path / "no.json")


# Other programs

HOSTILE = ['"];x [label="', "</node>\x00\x1b\ud800", "a\\", "new\nline"]


@pytest.mark.parametrize("merged", [False, True])
def test_networks_survive_hostile_names(by_hand, tmp_path, merged):
    networkx, pydot = pytest.importorskip("networkx"), pytest.importorskip("pydot")
    graph = by_hand(tokens=HOSTILE[:2], logit_labels=[HOSTILE[2] + HOSTILE[3]]).prune(1, 1)
    shown = merge(graph, supernodes=1) if merged else graph
    made = to_networkx(shown)
    assert networkx.is_directed_acyclic_graph(made) or merged
    assert made.number_of_nodes() == shown.n_nodes
    write_network(shown, tmp_path / "g.graphml", "graphml")
    read = networkx.read_graphml(tmp_path / "g.graphml")
    assert dict(read.nodes(data="name")) == dict(made.nodes(data="name"))
    assert {(a, b): w for a, b, w in read.edges(data="weight")} == {
        (a, b): w for a, b, w in made.edges(data="weight")
    }
    write_network(shown, tmp_path / "g.dot", "dot")
    (parsed,) = pydot.graph_from_dot_data((tmp_path / "g.dot").read_text())
    assert len(parsed.get_nodes()) == made.number_of_nodes()
    assert len(parsed.get_edges()) == made.number_of_edges()
    with pytest.raises(ValueError, match="kind: expected 'graphml' or 'dot', got 'png'"):
        write_network(shown, tmp_path / "g", "png")
