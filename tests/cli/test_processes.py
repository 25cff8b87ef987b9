"""``torchrun -m fasttc attribute``: one graph from two processes, and one line when something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from fasttc import Graph


def torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fasttc",
    ]
    return subprocess.run(
        [*words, *map(str, arguments)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_two_processes_write_one_graph(home: Path, tmp_path: Path, fasttc) -> None:
    common = ("attribute", home / "model", "--transcoders", home / "tcs", "--prompt-ids", "2,9,17,4,30,12")
    done = torchrun(Path.cwd(), *common, "--out", tmp_path / "together.graph", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"verb": "attribute"') == 1  # one of them reports
    assert fasttc(*common, "--out", tmp_path / "alone.graph")[0] == 0
    together, alone = (Graph.load(tmp_path / f"{name}.graph") for name in ("together", "alone"))
    assert torch.equal(together.features, alone.features)
    assert torch.equal(together.columns, alone.columns)
    torch.testing.assert_close(
        together.values, alone.values, rtol=1e-6, atol=1e-6 * float(alone.values.abs().max())
    )
