"""Graph files: round trips, whole or absent, and one clear line for every other file."""

import json
import math
import os
import resource
from dataclasses import fields

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasttc.graph import Graph, PrunedGraph, load_graph


def _assert_same(first, second):
    for field in fields(first):
        one, two = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, Tensor):
            assert one.dtype == two.dtype, field.name
            assert torch.equal(one, two), field.name
        elif isinstance(one, Graph):
            _assert_same(one, two)
        else:
            assert one == two, field.name


@pytest.fixture
def graph(random_case):
    case = random_case(3, torch.float32)
    nodes = len(case["adjacency"])
    remainder = torch.zeros(nodes, dtype=torch.float64)
    remainder[-1] = 0.25
    return Graph.from_dense(
        **case,
        remainder=remainder,
        tokens=["<bos>", "</script>", "\ud800", "\u2028", "é"],
        prompt="a\nprompt",
        metadata={"model": "m", "seed": 3, "versions": {"fasttc": "0"}},
    )


def _header(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fasttc.graph"])


def _changed(path, tensors=None, header=None):
    """Rewrites the file at ``path`` with other tensors or another header."""
    text = json.dumps(_header(path)) if header is None else header
    save_file(load_file(path) if tensors is None else tensors, path, metadata={"fasttc.graph": text})


def test_round_trip(graph, tmp_path):
    path = tmp_path / "folder" / "graph.safetensors"
    graph.save(path)
    _assert_same(Graph.load(path), graph)
    _assert_same(load_graph(str(path)), graph)
    assert os.listdir(path.parent) == [path.name]


def test_round_trip_of_tensors_that_share_memory(random_case, tmp_path):
    case = random_case(4)
    ids = torch.arange(50)
    graph = Graph.from_dense(
        **{**case, "input_ids": ids[:5], "logit_ids": ids[2 : 2 + len(case["logit_ids"])]}
    )
    graph.save(tmp_path / "g")
    _assert_same(Graph.load(tmp_path / "g"), graph)


def test_file_is_the_same_bit_for_bit(graph, tmp_path):
    graph.save(tmp_path / "one")
    Graph.load(tmp_path / "one").save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_pruned_round_trip(graph, tmp_path):
    pruned = graph.prune(0.7, 0.9)
    pruned.save(tmp_path / "p")
    loaded = PrunedGraph.load(tmp_path / "p")
    _assert_same(loaded, pruned.compact())
    _assert_same(load_graph(tmp_path / "p"), loaded)
    _assert_same(Graph.load(tmp_path / "p"), pruned.subgraph())
    assert loaded.scores() == pytest.approx(tuple(pruned.scores()), rel=1e-13)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "p").read_bytes() == (tmp_path / "again").read_bytes()


def test_pruned_round_trip_without_scores(by_hand, tmp_path):
    pruned = by_hand(adjacency=torch.zeros(9, 9)).prune()
    pruned.save(tmp_path / "p")
    assert math.isnan(PrunedGraph.load(tmp_path / "p").full_scores.replacement)


def test_replaces_an_older_file(graph, by_hand, tmp_path):
    by_hand().save(tmp_path / "g")
    graph.save(tmp_path / "g")
    _assert_same(Graph.load(tmp_path / "g"), graph)


def _half_a_file(error):
    def write(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_remains(graph, by_hand, tmp_path, monkeypatch, error):
    by_hand().save(tmp_path / "g")
    monkeypatch.setattr("fasttc.graph._io.save_file", _half_a_file(error))
    for thing in (graph, graph.prune()):
        with pytest.raises(type(error)):
            thing.save(tmp_path / "g")
    assert os.listdir(tmp_path) == ["g"]
    _assert_same(Graph.load(tmp_path / "g"), by_hand())


def test_nothing_half_written_remains_when_the_system_refuses_to_write(graph, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*File too large"):
            graph.save(tmp_path / "g")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("metadata", [{"a": {1, 2}}, {"a": math.nan}])
def test_metadata_must_fit_into_json(by_hand, tmp_path, metadata):
    with pytest.raises(TypeError, match="metadata: expected what JSON can hold"):
        by_hand(metadata=metadata).save(tmp_path / "g")
    assert os.listdir(tmp_path) == []


def _assert_refused(path, message):
    for load in (Graph.load, PrunedGraph.load, load_graph):
        with pytest.raises(ValueError, match=message) as refusal:
            load(path)
        assert str(path) in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_refuses_what_is_no_file(tmp_path):
    _assert_refused(tmp_path / "nothing", "there is no file of that name")
    _assert_refused(tmp_path, "there is no file of that name")


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04 pickled", b"\xff" * 4096])
def test_refuses_files_of_another_kind(tmp_path, content):
    (tmp_path / "g").write_bytes(content)
    _assert_refused(tmp_path / "g", r"expected a graph file \(safetensors\), got something else")


def test_refuses_other_tensors(tmp_path):
    save_file({"W_enc": torch.zeros(2)}, tmp_path / "g")
    _assert_refused(tmp_path / "g", "expected a graph file, got a safetensors file of another kind")


def test_refuses_a_truncated_file(graph, tmp_path):
    graph.save(tmp_path / "g")
    (tmp_path / "g").write_bytes((tmp_path / "g").read_bytes()[:-8])
    _assert_refused(tmp_path / "g", "expected a graph file")


def test_refuses_a_newer_schema(graph, tmp_path):
    graph.save(tmp_path / "g")
    _changed(tmp_path / "g", header=json.dumps({**_header(tmp_path / "g"), "schema_version": 2}))
    _assert_refused(tmp_path / "g", "written with graph schema 2, this fasttc reads up to 1: update fasttc")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "expected a JSON header"),
        pytest.param("[" * 100_000, "expected a JSON header", id="nested"),
        ("[]", "expected a schema version, got none"),
        ("{}", "expected a schema version, got none"),
        (
            '{"schema_version": 1, "tokens": []}',
            "missing in the header: n_layers, logit_labels, prompt, metadata",
        ),
    ],
)
def test_refuses_a_broken_header(graph, tmp_path, header, message):
    graph.save(tmp_path / "g")
    _changed(tmp_path / "g", header=header)
    _assert_refused(tmp_path / "g", message)


@pytest.mark.parametrize("name", ["features", "columns", "remainder"])
def test_refuses_missing_tensors(graph, tmp_path, name):
    graph.save(tmp_path / "g")
    _changed(tmp_path / "g", {key: t for key, t in load_file(tmp_path / "g").items() if key != name})
    _assert_refused(tmp_path / "g", f"broken graph file: missing tensors: {name}")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("features", torch.zeros(2, 2, dtype=torch.int64), "features: expected"),
        ("features", torch.zeros(2, 3), "features: expected integers"),
        ("values", torch.zeros(3), "broken graph file"),
        ("row_ptr", torch.arange(5), "row_ptr: expected"),
    ],
)
def test_refuses_broken_content(graph, tmp_path, name, tensor, message):
    graph.prune().save(tmp_path / "g")
    _changed(tmp_path / "g", {**load_file(tmp_path / "g"), name: tensor})
    _assert_refused(tmp_path / "g", message)


def test_refuses_a_graph_where_a_pruned_one_is_expected(graph, tmp_path):
    graph.save(tmp_path / "g")
    with pytest.raises(ValueError, match="expected a pruned graph, got a graph that was not pruned"):
        PrunedGraph.load(tmp_path / "g")


@pytest.mark.parametrize(
    ("pruned", "tensors", "message"),
    [
        ({}, {}, "broken graph file: 'node_threshold'"),
        ({"node_threshold": 0.8, "edge_threshold": 0.9, "full_scores": [1]}, {}, "broken graph file"),
        (None, {"influence": torch.zeros(3)}, "influence: expected .* entries, got shape"),
        (None, {"node_mask": None}, "missing tensors: node_mask"),
    ],
)
def test_refuses_a_broken_pruned_graph(graph, tmp_path, pruned, tensors, message):
    graph.prune().save(tmp_path / "g")
    header = _header(tmp_path / "g")
    changed = {name: t for name, t in {**load_file(tmp_path / "g"), **tensors}.items() if t is not None}
    header["pruned"] = header["pruned"] if pruned is None else pruned
    _changed(tmp_path / "g", changed, header=json.dumps(header))
    with pytest.raises(ValueError, match=message):
        PrunedGraph.load(tmp_path / "g")
