"""Targets shared out over processes: the same graph as from one, and errors instead of waiting for ever."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fasttc
from fasttc.attribution.rows import Rows, merge_rows
from fasttc.attribution.team import ALONE, Team

SCRIPT = Path(__file__).parent / "two_processes.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module, for its cases."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_two(tiny_model, random_set, tmp_path):
    """Runs the script in two processes on a saved model; model, set, folder, exit codes, seconds."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    model = tiny_model("gemma2")
    tcs = random_set(model, skip=True, n_features=24)
    model.save_pretrained(tmp_path / "model")
    tcs.save_pretrained(tmp_path / "transcoders")
    start = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, SCRIPT, str(rank), tmp_path], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0, 3], errors
    return model, tcs, tmp_path, time.monotonic() - start


def test_two_processes(run_two, script):
    model, tcs, folder, _ = run_two
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        graphs = {
            f"{name}.{turn}": (script.IDS, options)
            for name, options in script.CASES.items()
            for turn in (0, 1)
        }
        graphs |= {"many0.0": (script.IDS[:4], {}), "many1.0": (script.IDS[3:], {})}
        for name, (ids, options) in graphs.items():
            alone = fasttc.attribute(model, tcs, ids, **options)
            for rank in range(2):
                together = fasttc.Graph.load(folder / f"{name}.{rank}")
                for part in ("features", "row_ptr", "columns", "values", "remainder", "logit_probs"):
                    assert torch.equal(getattr(together, part), getattr(alone, part)), (name, rank, part)
    finally:
        torch.set_num_threads(threads)

    first, second = (json.loads((folder / f"told.{rank}.json").read_text()) for rank in range(2))
    assert first["bad target"] == second["bad target"]
    assert first["bad target"].startswith("ValueError: target token: expected an int in [0, 61), got 99")
    for told in (first, second):
        assert told["prompts"].startswith("ValueError: prompt: expected the same in all 2 processes, got [")
        assert told["on their own"] == told["afterwards"] == "nothing"
    assert first["one fails early"].startswith(
        "ConnectionError: process 1 of 2 failed: ValueError: target token"
    )
    assert second["one fails early"].startswith("ValueError: target token")
    assert first["one fails"] == "ConnectionError: process 1 of 2 failed: MemoryError: no room"
    assert second["one fails"] == "own: no room"
    assert first["one dies"].startswith(
        "ConnectionError: process 0 of 2: lost another process, which ended or did"
    )


def test_work_is_shared_evenly():
    team = Team()
    assert team.owners([3, 1, 2]) == [0, 0, 0]
    team.size = 3
    costs = [8, 1, 7, 3, 3, 2, 5, 4]
    owners = team.owners(costs)
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)
    ]
    assert max(loads) - min(loads) <= 1
    assert owners == team.owners(costs)
    assert team.owners([1.0]) == [0]


class _Scattered(Team):
    """Two processes in one: ``gather`` answers with what the other one holds as well."""

    size = 2

    def __init__(self, other: dict[int, torch.Tensor]) -> None:
        self.other = other

    def gather(self, tensor):
        return [tensor, self.other[tensor.data_ptr()]]


def _rows(numbers, counts, columns, values, remainder):
    left = torch.tensor(remainder, dtype=torch.float64)
    return Rows(*map(torch.tensor, (numbers, counts, columns, values)), left)


def test_rows_are_merged_in_order():
    own = _rows([0, 1, 4], [2, 0, 1], [5, 6, 7], [0.1, 0.2, 0.3], [0.0, 1.0, 2.0])
    other = _rows([2, 3], [1, 3], [1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0], [3.0, 4.0])
    names = ("numbers", "counts", "columns", "values", "remainder")
    team = _Scattered({getattr(own, name).data_ptr(): getattr(other, name) for name in names})
    merged = merge_rows(team, own, 5)
    assert merged.counts.tolist() == [2, 0, 1, 3, 1]
    assert merged.columns.tolist() == [5, 6, 1, 2, 3, 4, 7]
    torch.testing.assert_close(merged.values, torch.tensor([0.1, 0.2, 1.0, 2.0, 3.0, 4.0, 0.3]))
    assert merged.remainder.tolist() == [0.0, 1.0, 3.0, 4.0, 2.0]
    assert merge_rows(ALONE, own, 3) is own
