"""Every launcher through Triton's own JIT, up to the launch: what a GPU would meet first, met here without one.

The interpreter never sees how the JIT specialises arguments (None, unit strides, descriptors, floats), and the
ahead-of-time suite is told. Here the real launchers run against a driver that only names an architecture.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fasttc.benchmarks.ops.aot import cases_of, modules
from fasttc.kernels._launch import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_launcher_compiles_as_it_is_called(architecture):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "tests/kernels/compile_launchers.py", architecture],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = [json.loads(line) for line in done.stdout.splitlines()]
    registered = {case.kernel.__name__ for module in modules() for case in cases_of(module, 256).values()}
    assert {code["kernel"] for code in codes} == registered
    assert not [code for code in codes if code["spills"]]
    assert not [code for code in codes if code["shared"] > ARCHITECTURES[architecture].shared_bytes]
