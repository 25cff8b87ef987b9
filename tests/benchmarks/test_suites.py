"""The suites as processes: the GPU suite rehearsed on a CPU, the command line, two commits compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fasttc.benchmarks import record
from fasttc.benchmarks.ops import gpu, gpu_targets
from fasttc.benchmarks.ops.registry import REGISTRY
from fasttc.cli.bench import command as bench

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip


# A machine that has torch, triton, numpy and transformers with what these bring, and nothing else that we use.
BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("click", "interp_engine", "peft", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def rehearse(out: Path, site: Path, *words: str) -> list[dict]:
    """Rows of the summary of a rehearsal in a bare checkout, every part of which must succeed."""
    pytest.importorskip("triton")
    site.mkdir()
    (site / "sitecustomize.py").write_text(BARE)
    done = run("gpu", "--out", str(out), "--rehearse", *words, TRITON_INTERPRET="1", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = record.read(out / "summary.json")
    assert summary["rehearsal"] is True
    assert {row["status"] for row in summary["rows"]} == {"ok"}
    for row in summary["rows"]:
        found = record.read(out / f"{row['part']}.json")["rows"]
        ours = [r for r in found if r["competitor"].startswith("fasttc")]
        assert ours
        assert {r["gate"] for r in ours} == {"passed"}, ours
        assert row["part"] in (out / f"{row['part']}.log").read_text() or row["part"] in ("odd", "small")
    return summary["rows"]


def test_one_part_of_the_gpu_suite_rehearses_on_a_cpu(tmp_path):
    assert [row["part"] for row in rehearse(tmp_path / "out", tmp_path / "site", "--only", "encode")] == [
        "encode"
    ]


@pytest.mark.slow
def test_the_gpu_suite_rehearses_on_a_cpu_from_end_to_end(tmp_path):
    rows = rehearse(tmp_path / "out", tmp_path / "site")
    assert [row["part"] for row in rows] == [part.name for part in gpu.PARTS]


def test_a_part_that_fails_or_hangs_costs_that_part_alone(tmp_path):
    broken = gpu.Part("broken", "no such op", (), 0.0, 10.0)
    assert gpu.run_part(broken, tmp_path, "cpu", True, 0, 60.0)["status"] == "failed (2)"
    slow = gpu.Part("slow", "decode", ("6,8,32,3",), 0.0, 10.0)
    assert gpu.run_part(slow, tmp_path, "cpu", True, 0, 0.01)["status"] == "out of time"


def test_every_part_fits_the_budget_and_names_what_exists():
    assert sum(part.limit for part in gpu.PARTS) <= 8 * 60
    for part in gpu.PARTS:
        words = gpu.command(part, Path("out"), "cuda", False, 0)
        assert words.count("--shape") == len(part.shapes) > 0


def test_every_target_names_a_case_that_is_measured():
    parts = {part.name: part for part in gpu.PARTS}
    for target in gpu_targets.TARGETS:
        part = parts[target.part]
        assert set(target.shapes) <= set(part.shapes)
        known = REGISTRY[part.op].competitors
        assert target.other in (part.only or known) or target.other == "roof"


def test_targets_are_judged_and_rates_are_read_from_what_was_measured(tmp_path):
    assert {text.split(":")[0] for text in gpu_targets.judge(tmp_path)} == {"open"}
    assert gpu_targets.rates(tmp_path) == {}
    shape = "4096,2304,65536,64,bfloat16"
    rows = [("fasttc", 2.0), ("fasttc_tile", 2.0), ("dense", 3.0), ("gemm", 1.8)]
    common = {"shape": shape, "roof": 1.0, "bytes": 4e9}
    roofs = {"copy": 4e12, "gemm": {"bfloat16": 8e14}}
    record.write(
        tmp_path / "encode.json",
        {"roofs": roofs},
        [{**common, "competitor": name, "median": median} for name, median in rows],
    )
    record.write(tmp_path / "decode.json", {}, [{**common, "competitor": "fasttc", "median": 2.0}])
    said = [text for text in gpu_targets.judge(tmp_path) if not text.startswith("open")]
    assert said == [
        f"met: encode {shape}: gemm / ours = 0.90 (at least 0.80)",
        f"missed: encode {shape}: dense / ours = 1.50 (at least 1.80)",
        f"missed: decode {shape}: roof / ours = 0.50 (at least 0.70)",
    ]
    expected = {"bandwidth": 4e12, "half": 8e14, "gather": 2e12, "tile_efficiency": 0.9}
    assert gpu_targets.rates(tmp_path) == pytest.approx(expected)


def test_a_gpu_is_asked_for(tmp_path):
    done = run("gpu", "--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "expected a GPU, found none; --rehearse" in done.stderr
    done = run("gpu", "--out", str(tmp_path), "--rehearse", TRITON_INTERPRET="0")
    assert "expected TRITON_INTERPRET=1" in done.stderr


@pytest.mark.slow
def test_this_checkout_is_compared_with_a_commit():
    if record.commit() is None:
        pytest.skip("not in a git checkout")
    words = ["--op", "decode", "--shape", "4,4,16,2", "--device", "cpu", "--seconds", "0", "--tiny-roofs"]
    done = run("ops", "--base", "HEAD", *words, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    header, row = done.stdout.splitlines()
    assert header.split()[-3:] == ["HEAD", "here", "speed-up"]
    assert row.startswith("decode")


def test_fasttc_bench_is_the_same_command(tmp_path):
    out = tmp_path / "x.json"
    words = [
        "ops",
        "--op",
        "decode",
        "--shape",
        "4,4,16,2",
        "--only",
        "fasttc",
        "--device",
        "cpu",
        "--seconds",
        "0",
    ]
    result = CliRunner().invoke(bench, [*words, "--tiny-roofs", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["rows"][0]["gate"] == "passed"
    assert CliRunner().invoke(bench, ["nothing"]).exit_code == 2
