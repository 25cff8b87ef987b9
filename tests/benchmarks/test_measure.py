"""The benchmark runner: its arithmetic, its gate, its JSON, its verdicts."""

import json
from dataclasses import replace

import pytest
import torch

from fasttc.benchmarks import record, report
from fasttc.benchmarks.__main__ import SUITES
from fasttc.benchmarks.__main__ import main as benchmarks_main
from fasttc.benchmarks.ops import cpu, measure
from fasttc.benchmarks.ops.competitors import Missing, Run
from fasttc.benchmarks.ops.registry import REGISTRY, Problem, draw
from fasttc.benchmarks.ops.roofs import Roofs

TINY = Problem(6, 8, 32, 3)
ROOFS = Roofs(copy=1e9, gemm={"float32": 1e10})


# --- arithmetic ------------------------------------------------------------------------------------------------


def test_quantiles_lie_between_order_statistics():
    times = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert measure.quantile(times, 0.5) == 3.0
    assert measure.quantile(times, 0.2) == pytest.approx(1.8)
    assert measure.quantile([7.0], 0.8) == 7.0


def test_rounds_fit_the_budget():
    assert measure.rounds_for(0.1, 1.0) == 10
    assert measure.rounds_for(100.0, 1.0) == 3
    assert measure.rounds_for(0.0, 1.0) == 50


def test_the_roof_is_the_slower_of_products_and_bytes():
    assert ROOFS.seconds(2e10, 1e9, "float32") == 2.0
    assert ROOFS.seconds(1e9, 3e9, "float32") == 3.0


def test_competitors_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = measure.interleaved(calls, "cpu", budget=0.0)
    assert order == ["a", "b"] * 4  # one untimed call each, then three rounds
    assert {len(values) for values in times.values()} == {3}


def test_work_by_hand():
    work = REGISTRY["encode"].work(Problem(2, 3, 5, 1, "bfloat16"))
    assert work.flops == 2 * 2 * 3 * 5
    assert work.bytes == 2 * 3 * (2 + 5) + 8 * 2


def test_shapes_are_read_and_written():
    assert Problem.parse("1,2,3,4") == Problem(1, 2, 3, 4)
    assert Problem.parse(str(Problem(1, 2, 3, 4, "bfloat16"))) == Problem(1, 2, 3, 4, "bfloat16")
    with pytest.raises(ValueError, match=r"expected N,D,F,K .* got '1,2'"):
        Problem.parse("1,2")


def test_inputs_name_distinct_features_and_depend_on_the_seed_alone():
    drawn = draw(Problem(200, 4, 30, 7), "cpu", seed=1)
    assert all(len(set(row)) == 7 and 0 <= min(row) <= max(row) < 30 for row in drawn["indices"].tolist())
    again, other = draw(Problem(200, 4, 30, 7), "cpu", seed=1), draw(Problem(200, 4, 30, 7), "cpu", seed=2)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert not torch.equal(drawn["x"], other["x"])


# --- gate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", REGISTRY)
def test_ours_and_dense_pass_the_gate(op, dtype):
    spec, problem = REGISTRY[op], replace(TINY, dtype=dtype)
    ours = [name for name in spec.competitors if name.startswith("fasttc")]
    verdicts = measure.gate(spec, problem, "cpu", 0, [*ours, "dense"])
    assert verdicts["fasttc"] == verdicts["dense"] == "passed"
    without_kernels = "missing: kernels need a GPU or TRITON_INTERPRET=1"
    assert set(verdicts.values()) <= {"passed", without_kernels}, verdicts


def _spoiled(spec, spoil):
    """The spec with a competitor "bad" whose outputs are ours after ``spoil``."""

    def build(inputs, k):
        run = spec.competitors["fasttc"](inputs, k)
        return Run(run.call, lambda: spoil(dict(run.outputs())))

    return replace(spec, competitors={**spec.competitors, "bad": build})


def _off(outputs):
    name = list(outputs)[-1]
    flat = outputs[name].clone().reshape(-1)
    flat[0] += 0.01 * flat.abs().max()
    return {**outputs, name: flat.reshape(outputs[name].shape)}


def _short(outputs):
    return dict(list(outputs.items())[1:]) | {"other": torch.zeros(1)}


@pytest.mark.parametrize("spoil", [_off, _short], ids=["one element off", "an output missing"])
@pytest.mark.parametrize("op", REGISTRY)
def test_the_gate_refuses_a_wrong_implementation_and_does_not_time_it(op, spoil):
    spec = _spoiled(REGISTRY[op], spoil)
    rows = measure.measure(spec, TINY, "cpu", 0, ["fasttc", "bad"], ROOFS, budget=0.0)
    ours, bad = rows
    assert ours.gate == "passed"
    assert ours.median is not None
    assert ours.percent == pytest.approx(100 * ours.roof / ours.median)
    assert bad.gate.startswith("wrong: ")
    assert bad.median is None


def test_a_competitor_that_is_not_installed_is_named():
    def missing(inputs, k):
        raise Missing("nothing: No module named 'nothing'")

    spec = replace(REGISTRY["decode"], competitors={**REGISTRY["decode"].competitors, "gone": missing})
    (row,) = measure.measure(spec, TINY, "cpu", 0, ["gone"], ROOFS, budget=0.0)
    assert row.gate == "missing: nothing: No module named 'nothing'"


# --- records ---------------------------------------------------------------------------------------------------


def test_the_ops_suite_writes_one_line_per_row_with_its_origin(tmp_path, capsys):
    out = tmp_path / "deep/ops.json"
    arguments = ["ops", "--op", "decode", "--shape", "6,8,32,3", "--device", "cpu", "--seconds", "0"]
    assert (
        benchmarks_main(
            [*arguments, "--only", "fasttc", "--only", "dense", "--tiny-roofs", "--out", str(out)]
        )
        == 0
    )
    data = record.read(out)
    assert data["kind"] == "ops"
    assert {"device", "driver", "torch", "triton", "python", "commit", "seed", "threads"} <= data[
        "environment"
    ].keys()
    assert data["roofs"]["copy"] > 0
    assert [row["competitor"] for row in data["rows"]] == ["fasttc", "dense"]
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] for row in data["rows"])
    assert "fasttc" in capsys.readouterr().out
    assert sum(line.lstrip().startswith('{"') for line in out.read_text().splitlines()) == 2


def test_another_schema_is_refused(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"schema": 99, "rows": []}))
    with pytest.raises(ValueError, match=r"expected schema 1, got 99"):
        record.read(tmp_path / "x.json")


def test_a_file_without_rows_can_be_read(tmp_path):
    record.write(tmp_path / "x.json", {"kind": "ops"}, [])
    assert record.read(tmp_path / "x.json")["rows"] == []


# --- targets and report ----------------------------------------------------------------------------------------


def _row(name, median, extra):
    row = measure.Row("step", name, str(TINY), "passed", 3, median, median, median, None, 1.0, 1.0, 1.0, 50.0)
    return {**row.as_dict(), "extra": extra}


def test_targets_are_judged_by_time_and_memory():
    rows = [_row("fasttc", 100.0, 200), _row("dense", 260.0, 300), _row("sparsify", 120.0, 500)]
    assert [text.split(":")[0] for text in cpu.judge(rows)] == ["met", "missed", "missed", "met"]
    assert (
        cpu.judge([_row("fasttc", 100.0, 200), _row("dense", 260.0, 500)])[-1] == "open: no time of sparsify"
    )


def test_memory_of_a_step_counts_what_the_step_adds():
    """Gradients and Adam's moments of two [F, D] matrices are the least; weights and batch do not count."""
    problem = Problem(64, 64, 16384, 4)
    extra = cpu.memory_elsewhere("fasttc", problem, 0, threads=1)
    assert extra is not None
    matrices = 2 * problem.f * problem.d * 4
    assert 3 * matrices < extra < 12 * matrices


def test_the_report_fills_its_blocks_draws_its_charts_and_knows_when_they_are_stale(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    environment = record.environment("cpu", 0)
    rows = [_row("fasttc", 100.0, 2_000_000), _row("dense", 250.0, 4_000_000)]
    record.write(results / "some-cpu/step.json", {"kind": "cpu", "environment": environment}, rows)
    readme.write_text(
        "before\n<!-- benchmarks:some-cpu/step -->\nold\n<!-- /benchmarks:some-cpu/step -->\nafter\n"
    )
    arguments = ["report", "--root", str(tmp_path), "--results", str(results)]
    assert benchmarks_main([*arguments, "--check"]) == 1
    assert benchmarks_main(arguments) == 0
    text = readme.read_text()
    assert "| dense | 250 | 250 to 250 | 2.50 | 4 | 2.00 |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "250 ms" in (results / "some-cpu/step.svg").read_text()
    assert benchmarks_main([*arguments, "--check"]) == 0
    assert report.rendered("no blocks", results) == "no blocks"
    with pytest.raises(ValueError, match=r"block cpu/none: expected the file"):
        report.rendered("<!-- benchmarks:cpu/none -->\n<!-- /benchmarks:cpu/none -->", results)


def test_no_committed_table_or_chart_is_stale():
    assert benchmarks_main(["report", "--check"]) == 0


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_explains_itself(suite, capsys):
    pytest.importorskip("triton")
    with pytest.raises(SystemExit) as stopped:
        benchmarks_main([suite, "--help"])
    assert stopped.value.code == 0
    assert f"benchmarks {suite}" in capsys.readouterr().out
