"""Graphs of transcoders and adapters: whose feature a node is stays with it through everything done to the graph."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from fasttc.graph import (
    Graph,
    MergedGraph,
    PrunedGraph,
    diff,
    graph_json,
    load_graph,
    merge,
    node_ids,
    node_names,
)
from fasttc.graph.joint import joint_json
from fasttc.graph.networks import to_networkx
from fasttc.graph.read_json import graph_from_json

FIRST = [4, 5, 3]  # features below are transcoders', from here on adapters'


@pytest.fixture
def joint(random_case) -> Graph:
    return Graph.from_dense(**random_case(2, torch.float32), metadata={"model": "m", "adapters_from": FIRST})


def _owned(graph: Graph) -> set[tuple[int, ...]]:
    """(layer, position, index) of the adapters' features."""
    return {tuple(row) for row in graph.features[graph.from_adapter].tolist()}


def test_owners_follow_from_the_index(joint):
    expected = [index >= FIRST[layer] for layer, _, index in joint.features.tolist()]
    assert joint.from_adapter.tolist() == expected
    assert 10 < sum(expected) < len(expected) - 10
    assert joint.owners == ["adapter" if own else "transcoder" for own in expected]
    assert replace(joint, metadata={}).owners == []


def test_owners_survive_pruning_merging_and_files(joint, tmp_path):
    pruned = joint.prune(0.7, 0.9)
    kept = {tuple(row) for row in joint.features[pruned.node_mask[joint.feature_slice]].tolist()}
    assert 0 < len(kept & _owned(joint)) < len(_owned(joint))
    small = pruned.subgraph()
    assert _owned(small) == kept & _owned(joint)
    pruned.save(tmp_path / "p.graph")
    assert _owned(PrunedGraph.load(tmp_path / "p.graph").graph) == _owned(small)
    merge(pruned).save(tmp_path / "m.graph")
    assert _owned(MergedGraph.load(tmp_path / "m.graph").pruned.graph) == _owned(small)
    joint.save(tmp_path / "w.graph")
    again = load_graph(tmp_path / "w.graph")
    assert isinstance(again, Graph)
    assert again.owners == joint.owners


def test_a_supernode_has_one_owner():
    """Two features that play exactly the same part merge, unless one is an adapter's."""
    adjacency = torch.zeros(6, 6)  # features 0 and 1, error 2, tokens 3 and 4, logit 5
    adjacency[5, :2] = 1.0
    adjacency[:2, 3] = 2.0
    given = {
        "features": torch.tensor([[0, 0, 1], [0, 0, 6]]), "activations": torch.ones(2),
        "input_ids": torch.tensor([7]), "logit_ids": torch.tensor([9]), "logit_probs": torch.tensor([1.0]),
    }  # fmt: skip
    keep = [0, 1, 2, 3, 5]
    alone = Graph.from_dense(adjacency[keep][:, keep], **given)
    apart = replace(alone, metadata={"adapters_from": [5]})
    sizes = [
        sorted(len(members) for members in merge(g.prune(1, 1), supernodes=1).members())
        for g in (alone, apart)
    ]
    assert sizes == [[1, 1, 2], [1, 1, 1, 1]]


def test_names_give_the_adapters_own_numbers(joint):
    names = node_names(joint)
    for node, (layer, position, index) in enumerate(joint.features.tolist()):
        number = f"A{index - FIRST[layer]}" if index >= FIRST[layer] else str(index)
        assert names[node] == f"L{layer}/{number}@{position} {joint.tokens[position]}"


def test_tokens_are_named_once_quoted(joint):
    spaced = replace(joint, tokens=[" hip", " ", "\n", "a", "b"], logit_labels=[" ", "c", " d"])
    names = node_names(spaced)
    assert names[spaced.token_slice] == ["'hip'@0", "' '@1", "'\\n'@2", "'a'@3", "'b'@4"]
    assert names[spaced.logit_slice] == ["say ' '", "say c", "say d"]


def test_json_says_whose_a_feature_is_and_gives_it_back(joint, shared_data):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((shared_data / "schemas" / "neuronpedia-graph-schema.json").read_text())
    pruned = joint.prune(0.9).compact()
    content = json.loads(json.dumps(graph_json(pruned, slug="s")))
    jsonschema.Draft7Validator(schema).validate(content)
    own = [node.get("owner") for node in content["nodes"]]
    assert own[: pruned.n_features] == pruned.graph.owners
    assert set(own[pruned.n_features :]) == {None}
    back, _ = graph_from_json(content)
    assert back.graph.owners == pruned.graph.owners
    again = graph_json(back, slug="s")
    assert [node.get("owner") for node in again["nodes"]] == [node.get("owner") for node in content["nodes"]]
    assert again["metadata"]["adapters_from"] == FIRST
    plain = graph_json(replace(joint, metadata={}).prune(0.9), slug="s")
    assert all("owner" not in node for node in plain["nodes"])
    assert "adapters_from" not in plain["metadata"]


@pytest.mark.parametrize("first", [3, [1, 2], [1, 2, "3"], [1, 2, 3.0], [True, 2, 3]])
def test_files_with_broken_owners_are_refused(joint, first):
    content = graph_json(joint, slug="s")
    with pytest.raises(ValueError, match="adapters_from: expected 3 integers, got"):
        graph_from_json({**content, "metadata": {**content["metadata"], "adapters_from": first}})


def test_other_programs_are_told_too(joint):
    pytest.importorskip("networkx")
    pruned = joint.prune(0.9).compact()
    made = to_networkx(pruned)
    ids = node_ids(pruned.graph, pruned.node_mask)
    assert [made.nodes[name].get("owner") for name in ids[: pruned.n_features]] == pruned.graph.owners
    assert "owner" not in made.nodes[ids[-1]]


def test_on_one_canvas_and_in_a_diff_adapters_are_their_own(joint):
    whole = joint.prune(1, 1)
    content = joint_json(whole, whole, slug="s")
    owners = {node["node_id"]: node["owner"] for node in content["nodes"]}
    kept = node_ids(joint, whole.node_mask)[: whole.n_features]
    of_adapters = joint.from_adapter[whole.node_mask[joint.feature_slice]].tolist()
    assert [owners.pop(name) == "adapter" for name in kept] == of_adapters
    assert set(owners.values()) == {"both"}
    found = diff(joint, joint, carried=set())
    trusted = {change.feature for change in found.nodes if change.feature and change.trusted}
    assert trusted <= {(layer, index) for layer, _, index in _owned(joint)}
    assert trusted
    again = joint_json(whole, whole, slug="s", carried=set())
    assert {node["node_id"] for node in again["nodes"] if node["owner"] == "adapter"} == {
        name for name, own in zip(kept, of_adapters, strict=True) if own
    }


def test_a_number_that_is_another_owners_in_the_other_graph_is_refused(joint):
    """Adapters alone are numbered from 0, as transcoders are; beside transcoders, from the first that is free."""
    plain, alone = replace(joint, metadata={}), replace(joint, metadata={"adapters_from": [0, 0, 0]})
    for pair in ((joint, alone), (alone, joint), (plain, alone), (plain, joint)):
        for compare in (diff, partial(joint_json, slug="s")):
            with pytest.raises(
                ValueError, match="tuned: expected adapters beside transcoders of the same width"
            ):
                compare(*pair)
    beyond = replace(
        joint, metadata={"adapters_from": [100, 100, 100]}
    )  # no feature of plain has such a number
    assert len(diff(plain, beyond).nodes) == len(diff(plain, plain).nodes) > 0
