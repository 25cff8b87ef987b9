"""JSON for the viewers of circuit-tracer and Neuronpedia."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from fasttc import __version__
from fasttc.graph import Graph, PrunedGraph, graph_json, node_ids, write_graph_json
from fasttc.graph.read_json import graph_from_json

HOSTILE = [
    "</script><script>alert(1)</script>",
    "\ud800",
    '"\\\n\x00',
    "\u2028é",
    "<img src=x onerror=alert(1)>",
]


@pytest.fixture
def schema(shared_data):
    return json.loads((shared_data / "schemas" / "neuronpedia-graph-schema.json").read_text())


def _described(oracle):
    metadata = oracle.json["metadata"]
    labels = [node["clerp"].split('"')[1] for node in oracle.json["nodes"] if node["feature_type"] == "logit"]
    return {"tokens": metadata["prompt_tokens"], "prompt": metadata["prompt"], "logit_labels": labels}


def test_matches_the_reference_files(oracle):
    graph = oracle.graph("ct_graph", **_described(oracle), metadata={"model": f"local/{oracle.name}"})
    ours, theirs = graph_json(graph, slug=oracle.json["metadata"]["slug"]), oracle.json
    assert set(ours) == set(theirs)
    assert ours["qParams"] == theirs["qParams"]
    assert {name: ours["metadata"][name] for name in theirs["metadata"]} == theirs["metadata"]
    assert len(ours["nodes"]) == len(theirs["nodes"])
    shares = len(graph.features) * float(np.finfo(np.float32).eps)  # theirs is a float32 running sum
    for mine, reference in zip(ours["nodes"], theirs["nodes"], strict=True):
        assert mine.keys() == reference.keys()
        assert mine["influence"] == pytest.approx(reference["influence"], abs=2 * shares)
        for name, value in reference.items():
            if name in ("activation", "token_prob") and value is not None:
                assert np.float32(mine[name]) == np.float32(value)
            elif name != "influence":
                assert mine[name] == value, name
    assert [(link["source"], link["target"], np.float32(link["weight"])) for link in ours["links"]] == [
        (link["source"], link["target"], np.float32(link["weight"])) for link in theirs["links"]
    ]


@pytest.mark.parametrize("dtype", ["ct_graph", "ct_graph_f64"])
def test_fits_the_published_schema(oracle, schema, dtype):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft7Validator(schema)
    graph = oracle.graph(dtype, metadata={"model": "m", "transcoders": "set"})
    validator.validate(json.loads(json.dumps(graph_json(graph, slug="a"))))
    validator.validate(graph_json(graph.prune(0.5, 0.5), slug="a", labels={(0, 1): "x"}))
    with pytest.raises(jsonschema.ValidationError):  # the schema can refuse
        validator.validate({**graph_json(graph, slug="a"), "nodes": [{"node_id": 3}]})


def test_says_where_it_comes_from(by_hand):
    graph = by_hand(metadata={"model": "gemma", "transcoders": ["a", "b"]}, tokens=["x", "y"], prompt="x y")
    metadata = graph_json(graph.prune(0.7, 0.9), slug="s")["metadata"]
    assert metadata == {
        "slug": "s",
        "scan": "gemma",
        "transcoder_list": ["a", "b"],
        "prompt_tokens": ["x", "y"],
        "prompt": "x y",
        "node_threshold": 0.7,
        "schema_version": 1,
        "info": {"generator": {"name": "fasttc", "version": __version__}},
        "pruning_settings": {"node_threshold": 0.7, "edge_threshold": 0.9},
    }
    details = {"feature_details": {"feature_json_base_url": "http://127.0.0.1"}}
    named = graph_json(graph, slug="s", scan="other", transcoders=["c"], metadata=details)["metadata"]
    assert (named["scan"], named["transcoder_list"], named["node_threshold"]) == ("other", ["c"], 0.8)
    assert named["feature_details"] == details["feature_details"]
    assert graph_json(by_hand(), slug="s")["metadata"]["scan"] == ""
    assert graph_json(by_hand(metadata={"transcoders": "d"}), slug="s")["metadata"]["transcoder_list"] == [
        "d"
    ]


def test_carries_labels_and_viewer_state(by_hand):
    content = graph_json(
        by_hand(), slug="s", labels={(1, 7): "b", (0, 0): "?"}, q_params={"pinnedIds": ["1_7_1"]}
    )
    assert {node["node_id"]: node["clerp"] for node in content["nodes"] if node["activation"]} == {
        "0_5_1": "",
        "1_7_1": "b",
    }
    assert content["qParams"] == {
        "pinnedIds": ["1_7_1"],
        "supernodes": [],
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }


def test_writes_float32_with_the_fewest_digits(by_hand):
    graph = by_hand(adjacency=by_hand().dense().float() * 0.1)
    weights = [link["weight"] for link in graph_json(graph, slug="s")["links"]]
    assert 0.3 in weights  # not 0.30000001192092896
    assert [np.float32(weight) for weight in weights] == graph.prune().edges()[2].tolist()


# Ids


def _colliding(by_hand, index):
    features = torch.tensor([[0, 1, index], [1, 1, 7]])
    adjacency = by_hand().dense()
    adjacency[1, 3], adjacency[8, 5] = 5.0, 5.0  # errors (0, 1) and (1, 1) matter
    return by_hand(features=features, adjacency=adjacency)


def test_ids_of_all_nodes(by_hand):
    assert node_ids(by_hand()) == [
        "0_5_1", "1_7_1", "0_0_0_error", "0_0_1_error", "0_1_0_error", "0_1_1_error", "E_11_0", "E_12_1", "3_42_1",
    ]  # fmt: skip


@pytest.mark.parametrize("layer", [0, 1])
def test_errors_step_aside_for_features_of_the_same_id(by_hand, layer):
    graph = _colliding(by_hand, index=layer)
    content = graph_json(graph.prune(1.0, 1.0), slug="s")
    kinds = {node["node_id"]: node["feature_type"] for node in content["nodes"]}
    assert len(kinds) == len(content["nodes"])
    assert kinds[f"0_{layer}_1"] == "cross layer transcoder"
    assert kinds[f"0_{layer}_1_error"] == "mlp reconstruction error"
    assert kinds[f"0_{1 - layer}_1"] == "mlp reconstruction error"
    source, target = (f"0_{layer}_1_error", "3_42_1") if layer else ("0_0_1_error", "1_7_1")
    assert {"source": source, "target": target, "weight": 5.0} in content["links"]
    assert all({link["source"], link["target"]} <= set(kinds) for link in content["links"])


def test_an_id_does_not_depend_on_what_else_was_kept(by_hand):
    graph = _colliding(by_hand, index=1)
    mask = torch.ones(graph.n_nodes, dtype=torch.bool)
    mask[0] = False  # feature 0_1_1; the error of layer 1 stays
    assert node_ids(graph, mask) == node_ids(graph)[1:]
    whole = graph.prune(1.0, 1.0)
    targets, sources, _ = whole.edges()
    without = replace(whole, node_mask=mask & whole.node_mask, edge_mask=(targets != 0) & (sources != 0))
    groups = [["both", "0_1_1_error", "1_7_1"], ["gone", "0_1_1"]]
    state = {"pinnedIds": ["0_1_1", "0_1_1_error", "9_9_9"], "supernodes": groups}
    for pruned, pins, supernodes in (
        (whole, ["0_1_1", "0_1_1_error"], groups),
        (without, ["0_1_1"], [["both", "0_1_1", "1_7_1"]]),  # circuit-tracer's id of the error
    ):
        content = graph_json(pruned, slug="s", q_params=state)
        assert (content["qParams"]["pinnedIds"], content["qParams"]["supernodes"]) == (pins, supernodes)
        _, read = graph_from_json(content)
        assert read.groups["both"] == ("0_1_1_error", "1_7_1")


def test_two_targets_of_one_token_have_two_ids(by_hand):
    adjacency = torch.zeros(10, 10)
    adjacency[:9, :9], adjacency[9, 1] = by_hand().dense(), 1.0
    graph = by_hand(
        adjacency=adjacency, logit_ids=torch.tensor([42, 42]), logit_probs=torch.tensor([0.5, 0.5])
    )
    assert node_ids(graph)[-2:] == ["3_42_1", "3_42_1_2"]


@pytest.mark.parametrize("seed", range(3))
def test_ids_are_unique(random_case, seed):
    graph = Graph.from_dense(**random_case(seed))  # feature indices below 9 collide with 3 layers of errors
    ids = node_ids(graph)
    assert len(set(ids)) == len(ids) == graph.n_nodes
    assert any(node_id.endswith("_error") for node_id in ids)


# Files


def test_writes_the_graph_and_enters_it_in_the_index(by_hand, tmp_path):
    path = write_graph_json(by_hand(prompt="one"), tmp_path / "graphs", slug="first")
    assert path == tmp_path / "graphs" / "first.json"
    assert json.loads(path.read_text()) == graph_json(by_hand(prompt="one"), slug="first")
    assert ", " not in path.read_text()  # compact
    write_graph_json(by_hand(prompt="two"), tmp_path / "graphs", slug="second")
    write_graph_json(by_hand(prompt="three"), tmp_path / "graphs", slug="first", scan="model")
    index = json.loads((tmp_path / "graphs" / "graph-metadata.json").read_text())
    assert [(entry["slug"], entry["prompt"], entry["scan"]) for entry in index["graphs"]] == [
        ("second", "two", ""),
        ("first", "three", "model"),
    ]
    assert sorted(os.listdir(tmp_path / "graphs")) == ["first.json", "graph-metadata.json", "second.json"]


def test_a_saved_graph_gives_the_same_file(random_case, tmp_path):
    pruned = Graph.from_dense(**random_case(1, torch.float32)).prune()
    pruned.save(tmp_path / "p")
    written = graph_json(PrunedGraph.load(tmp_path / "p"), slug="s")
    assert written == graph_json(pruned, slug="s")


def test_keeps_what_others_entered_in_the_index(by_hand, oracle, tmp_path):
    (tmp_path / "graph-metadata.json").write_text(json.dumps({**oracle.index, "note": "kept"}))
    write_graph_json(by_hand(), tmp_path, slug="ours")
    index = json.loads((tmp_path / "graph-metadata.json").read_text())
    assert index["note"] == "kept"
    assert index["graphs"][:-1] == oracle.index["graphs"]
    assert index["graphs"][-1]["slug"] == "ours"


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "expected a JSON file"), ("[]", 'expected {"graphs"'), ('{"graphs": 3}', 'expected {"graphs"')],
)
def test_leaves_a_broken_index_alone(by_hand, tmp_path, content, message):
    (tmp_path / "graph-metadata.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        write_graph_json(by_hand(), tmp_path, slug="s")
    assert os.listdir(tmp_path) == ["graph-metadata.json"]
    assert (tmp_path / "graph-metadata.json").read_text() == content


@pytest.mark.parametrize("slug", ["", "../up", "a/b", ".hidden", "a b", "a\n", "é", None, "graph-metadata"])
def test_slugs_name_a_file_in_the_folder(by_hand, tmp_path, slug):
    with pytest.raises(ValueError, match="slug: expected"):
        write_graph_json(by_hand(), tmp_path / "graphs", slug=slug)
    assert os.listdir(tmp_path) == []


def test_nothing_half_written_remains(by_hand, tmp_path, monkeypatch):
    write_graph_json(by_hand(prompt="old"), tmp_path, slug="s")
    before = {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)}

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_graph_json(by_hand(prompt="new"), tmp_path, slug="s")
    assert {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)} == before


def test_hostile_strings_are_data(by_hand, tmp_path):
    for text in HOSTILE:
        graph = by_hand(tokens=[text, "b"], prompt=text, logit_labels=[text], metadata={"model": text})
        path = write_graph_json(graph, tmp_path, slug="s", labels={(0, 5): text})
        for file in (path, tmp_path / "graph-metadata.json"):
            raw = file.read_bytes()
            assert b"<" not in raw
            assert all(byte < 128 for byte in raw)
        content = json.loads(path.read_text())
        assert content["metadata"]["prompt_tokens"][0] == content["metadata"]["prompt"] == text
        assert content["nodes"][0]["clerp"] == text
        assert content["nodes"][-1]["clerp"] == f'Output "{text}" (p=0.500)'
