"""The suites as processes: the GPU suite rehearsed on a CPU, the command line, two commits compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fasttc.benchmarks import gpu, record
from fasttc.cli.bench import command as bench

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_gpu_suite_rehearses_on_a_cpu(tmp_path):
    pytest.importorskip("triton")
    done = run("gpu", "--out", str(tmp_path), "--rehearse", "--only", "encode", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = record.read(tmp_path / "summary.json")
    assert summary["rehearsal"] is True
    assert [(row["part"], row["status"]) for row in summary["rows"]] == [("encode", "ok")]
    ours = record.read(tmp_path / "encode.json")["rows"][0]
    assert (ours["competitor"], ours["gate"]) == ("fasttc", "passed")
    assert "encode" in (tmp_path / "encode.log").read_text()


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


def test_a_gpu_is_asked_for(tmp_path):
    done = run("gpu", "--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "expected a GPU, found none; --rehearse" in done.stderr
    done = run("gpu", "--out", str(tmp_path), "--rehearse", TRITON_INTERPRET="0")
    assert "expected TRITON_INTERPRET=1" in done.stderr


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
