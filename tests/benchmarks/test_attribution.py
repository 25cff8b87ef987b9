"""The attribution suite on a toy case: both algorithms agree, every part runs, targets are judged."""

import json
from pathlib import Path

import pytest
import torch

import fasttc
from fasttc.benchmarks import record
from fasttc.benchmarks.attribution import case, dense_prune, gpu, suite, tasks
from fasttc.benchmarks.attribution.judge import judge, table
from fasttc.benchmarks.attribution.replicated import Dense, Replicated


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("case")
    case.save(folder, suite.TINY_SHAPE, 0)
    return folder


def test_both_algorithms_find_the_same_graph(toy):
    model, tcs = case.open_case(toy)
    ids = case.prompt(12, 64, 7)
    graph = fasttc.attribute(model, tcs, ids)
    dense = Replicated(model, tcs, ids, 16).run()
    assert graph.n_features > 50
    assert torch.equal(dense.features, graph.features)
    torch.testing.assert_close(
        dense.adjacency, graph.dense(), rtol=0, atol=1e-5 * float(graph.values.abs().max())
    )
    torch.testing.assert_close(dense.logit_probs.double(), graph.logit_probs, rtol=1e-5, atol=0)

    nodes, edges, cumulative = dense_prune.prune(Dense(graph.dense(), graph.features, dense.logit_probs, 12))
    pruned = graph.prune()
    assert torch.equal(nodes, pruned.node_mask)
    assert torch.equal(edges, pruned.dense_mask())
    torch.testing.assert_close(cumulative.double(), pruned.cumulative, rtol=0, atol=1e-5)
    assert dense_prune.scores(dense) == pytest.approx(tuple(graph.scores())[:2], abs=1e-5)


def test_chosen_rows_come_in_the_order_of_the_graph(toy):
    model, tcs = case.open_case(toy)
    ids = case.prompt(12, 64, 7)
    graph = fasttc.attribute(model, tcs, ids, max_feature_nodes=30)
    order = graph.influence()[graph.feature_slice].argsort(descending=True)
    dense = Replicated(model, tcs, ids, 16).run(graph.features[order])
    assert torch.equal(dense.features, graph.features)
    torch.testing.assert_close(
        dense.adjacency, graph.dense(), rtol=0, atol=1e-5 * float(graph.values.abs().max())
    )


def test_every_part_runs(toy, monkeypatch, tmp_path, capsys):
    def here(task, arguments, folder, threads):
        return {"task": task, **arguments, **json.loads(json.dumps(tasks.TASKS[task](folder, **arguments)))}

    monkeypatch.setattr(suite, "in_process", here)
    suite.main(["--tiny", "--out", str(tmp_path / "found.json")])
    found = record.read(tmp_path / "found.json")
    assert {row["task"] for row in found["rows"]} == set(tasks.TASKS)
    told = {verdict["what"]: verdict for verdict in found["targets"]}
    assert told["largest difference between their edges"]["met"]
    assert len(found["targets"]) == 14
    assert "circuit-tracer's algorithm" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "found.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.slow
def test_a_task_in_a_process_and_its_failure(toy):
    found = suite.in_process("tokens_scaling", {"tokens": [4], "rounds": 1}, toy, 1)
    assert found["task"] == "tokens_scaling"
    assert found["seconds"][0] > 0
    with pytest.raises(RuntimeError, match=r"tokens_scaling .*a number"):
        suite.in_process("tokens_scaling", {"tokens": ["a number"], "rounds": 1}, toy, 1)


def test_missed_targets_are_told():
    rows = [
        {"task": "ours", "seconds": 1.0, "extra": 50, "features": 5, "edges": 7},
        {
            "task": "replicated", "batch": 64, "seconds": 11.0, "extra": 100, "difference": 1e-4,
            "shares": {"features": 0.5, "backward": 0.3, "forward": 0.07},
        },
        {"task": "tokens_scaling", "tokens": [2, 4, 8], "seconds": [1.0, 4.0, 20.0]},
        {"task": "targets_scaling", "targets": 3, "tokens": [2, 4], "seconds": [1.0, 3.0], "operations": [1.0, 2.0]},
    ]  # fmt: skip
    verdicts = judge(rows)
    assert [verdict["met"] for verdict in verdicts] == [False, False, False, False, True, False, False]
    assert "11.0 × faster" in verdicts[0]["measured"]
    assert table(verdicts).count("MISSED") == 6


def test_the_gpu_part_rehearses(tmp_path, capsys):
    gpu.main(["--rehearse", "--out", str(tmp_path / "gpu.json")])
    found = record.read(tmp_path / "gpu.json")
    assert found["rehearsal"]
    assert {"forward", "encode", "sweep and ranking", "finish"} <= set(found["rows"][0]["phases"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as stop:
            gpu.main([])
        assert stop.value.code == 2
        assert "expected a GPU, found none; --rehearse" in capsys.readouterr().err
