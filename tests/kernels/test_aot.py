"""Configs, and the ahead-of-time suite: it compiles what the kernels register and notices broken promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttc.kernels import _launch

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess:
    """A process of its own, where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_an_unknown_architecture_uses_the_nearest_lower_one():
    found = {
        name: _launch.nearest_architecture(name)
        for name in ("sm_75", "sm_86", "sm_90", "sm_103", "sm_121", "gfx90a", "gfx950")
    }
    assert found == {
        "sm_75": "sm_80", "sm_86": "sm_80", "sm_90": "sm_90", "sm_103": "sm_100", "sm_121": "sm_120",
        "gfx90a": "gfx942", "gfx950": "gfx942",
    }  # fmt: skip


def test_configs_are_shipped_not_timed(monkeypatch):
    table = _launch.config_table(_launch.config(4, 2, BLOCK=64), sm_90=_launch.config(8, 3, BLOCK=128))
    chosen = _launch.configure(table, torch.device("cpu"), candidates=[table["sm_80"]], run=pytest.fail)
    assert chosen == table["sm_90"]
    assert chosen.options() == {"BLOCK": 128, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    with pytest.raises(ValueError, match=r"expected architectures among .* got \['sm_7'\]"):
        _launch.config_table(chosen, sm_7=chosen)


def test_the_suite_compiles_a_kernel_and_prints_its_footprint(tmp_path):
    done = python("-m", "benchmarks", "aot", "--d", "2304", "--targets", "sm_90,gfx942", "--only",
                  "encode: pre_activations bf16", "--out", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 rows, 0 fail" in done.stdout
    assert len(list(tmp_path.glob("triton-*.json"))) == 1


def test_the_suite_notices_broken_promises():
    done = python("-c", """
from dataclasses import replace
from fasttc.benchmarks.ops.aot_inspect import inspect
from fasttc.kernels import encode
from fasttc.kernels._launch import config, config_table

case = next(c for c in encode.aot_cases(2304) if c.name == "pre_activations bf16")
wide = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, DESCRIPTOR=False, PARTS=1)
print(inspect(replace(case, configs=config_table(config(8, 6, **wide))), "sm_80").failures)
print(inspect(replace(case, divisible=(), configs=config_table(config(8, 2, **wide))), "gfx942").failures)
""")  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "shared memory" in first
    assert "no 128-bit loads" in second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--targets", "sm_1"), "--targets: expected some of sm_80,.* got sm_1"),
        (("--only", "no such kernel"), "0 rows"),
    ],
)
def test_the_suite_refuses_to_check_nothing(arguments, message):
    done = python("-m", "benchmarks", "aot", "--no-write", *arguments)
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr)


def test_the_suite_refuses_to_compile_interpreted_kernels():
    from fasttc.benchmarks.ops import aot

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here")
    assert aot.main(["--no-write"]) == 2
