"""Several processes train what one would; when one is killed the others stop, and the checkpoint continues."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fasttc.training.distributed import Processes, ProcessLost, processes

CONTEXT = ("--context", "16", "--tokens", 64 * 9, "--batch-size", "4", "--split-seed", "1")
KINDS = {
    "train": ("train", "MODEL", "--features", "48", "-k", "6", "--lr", "3e-3"),
    "train-jumprelu": (
        "train", "MODEL", "--features", "48", "-k", "6", "--activation", "jumprelu", "--lr", "3e-3"
    ),
    "train-shared": ("train", "MODEL", "--features", "50", "-k", "6", "--lr", "3e-3", "--shard-features"),
    "train-shared-relu": (
        "train", "MODEL", "--features", "50", "-k", "6", "--activation", "relu", "--lr", "3e-3", "--shard-features"
    ),
    "train-shared-watched": (  # worse from the second step on: the best weights are older than the checkpoint
        "train", "MODEL", "--features", "50", "-k", "6", "--lr", "0.12", "--warmup", "0.95", "--patience", "99",
        "--shard-features"
    ),
    "adapt-shared": ("adapt", "MODEL", "--transcoders", "TCS", "--lr", "3e-3", "--shard-features"),
    "adapt": ("adapt", "MODEL", "--transcoders", "TCS", "--lr", "3e-3"),
    "finetune": ("finetune", "MODEL", "--lr", "1e-3", "--micro-batch", "1"),
    "finetune-lora": ("finetune", "MODEL", "--lr", "1e-3", "--parameters", "lora", "--lora-rank", "2"),
}  # fmt: skip


@pytest.fixture
def launch(
    fork: Any, tiny_model: Any, data: Any, tmp_path: Path
) -> Callable[..., list[tuple[int, str, float]]]:
    """``launch(kind, out, size=1, dies=(rank, what, call), more=())``: per process (exit code, output, seconds)."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    lines = [json.dumps({"input_ids": ids}) for ids in data.documents[:60]]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    places = {"MODEL": tmp_path / "model", "TCS": tmp_path / "base"}

    def start(kind: str, out: str, size: int = 1, dies: Any = None, more: Any = ()) -> Any:
        arguments = [places.get(word, word) for word in KINDS[kind]]
        arguments += ["--data", tmp_path / "data.jsonl", *CONTEXT, "--dtype", "float64", *more]
        arguments += ["--out", tmp_path / out]
        jobs = [
            {
                "log": str(tmp_path / f"{out}.{rank}.log"),
                "arguments": [str(argument) for argument in arguments],
                "dies_at": dies[1:] if dies and dies[0] == rank else None,
            }
            for rank in range(size)
        ]
        return fork("_process.py", jobs)

    return start


def _result(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}.{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _succeeds(outcomes: list[tuple[int, str, float]]) -> None:
    for code, printed, _ in outcomes:
        assert code == 0, printed


def _assert_equal_to_rounding(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """All is computed in float64: what differs by 1e-9 of the largest entry differs by more than the order of sums."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == torch.float64
        assert float((got[name] - tensor).abs().max()) <= 1e-9 * float(tensor.abs().max()), name


@pytest.mark.parametrize(("kind", "size"), [
    ("train", 2),
    ("train", 4),
    pytest.param("train-jumprelu", 3, marks=pytest.mark.slow),
    ("train-shared", 2),
    pytest.param("train-shared-relu", 2, marks=pytest.mark.slow),
    ("adapt", 3),
    ("adapt-shared", 3),
    ("finetune", 3),
    pytest.param("finetune-lora", 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_several_processes_train_what_one_does(launch, tmp_path, kind, size):
    """Four processes on three layers: one has none of its own. Three on four rows: shares of 1, 1 and 2.

    50 features on three processes: 16, 17 and 17.
    """
    if kind.startswith("adapt"):
        _succeeds(launch("train-jumprelu", "base", more=("--seed", "3")))
    if kind == "finetune-lora":
        pytest.importorskip("peft")
    _succeeds(launch(kind, "one"))
    _succeeds(launch(kind, "several", size))
    one, several = _result(tmp_path / "one"), _result(tmp_path / "several")
    assert one
    if kind.startswith("adapt"):  # only the first process measures what carried over
        assert (tmp_path / "several.run" / "features.csv").is_file()
        printed = [(tmp_path / f"several.{rank}.log").read_text() for rank in range(size)]
        assert ["verdict" in text or "kept" in text for text in printed] == [
            rank == 0 for rank in range(size)
        ]
    _assert_equal_to_rounding(several, one)
    reports = [
        json.loads((tmp_path / f"{out}.run" / "report.json").read_text()) for out in ("one", "several")
    ]
    for name in {"fvu", "l0", "ce_before", "ce_after"} & reports[0].keys():
        assert reports[1][name] == pytest.approx(reports[0][name], rel=1e-9)
    logs = [
        (tmp_path / f"{out}.run" / "metrics.jsonl").read_text().splitlines() for out in ("one", "several")
    ]
    assert len(logs[0]) == len(logs[1]) >= 1
    assert json.loads(logs[1][0])["loss"] == pytest.approx(json.loads(logs[0][0])["loss"], rel=1e-9)


Death = tuple[int, str, int]
"""(rank, at what, at which call of it since its start)."""

DEATHS: dict[str, list[Death]] = {
    "train": [(1, "block", 5), (0, "checkpoint", 1), (1, "update", 5)],
    "train-shared": [(0, "update", 7), (1, "checkpoint", 1), (1, "result", 4)],
    "train-shared-watched": [(1, "block", 8)],
    "finetune": [(0, "block", 8), (1, "update", 1)],
}


def _dies(launch: Any, kind: str, death: Death, more: Any) -> None:
    """One of two processes dies, and the other says so at once."""
    rank = death[0]
    outcomes = launch(kind, "out", 2, dies=death, more=more)
    assert outcomes[rank][0] == -9, outcomes[rank][1]
    code, printed, seconds = outcomes[1 - rank]
    assert code == 2, printed
    assert "another process of this training has ended or did not answer" in printed
    assert seconds < 10


def _same_bits(one: Path, two: Path) -> None:
    found, expected = _result(one), _result(two)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", DEATHS)
def test_deaths_stop_the_others_and_the_checkpoint_continues_to_the_same_bits(launch, tmp_path, kind):
    """One death after the other, at different steps and on both ranks, each in the sitting that continues."""
    every = ("--checkpoint-every", "2")
    _succeeds(launch(kind, "whole", 2))
    resume: tuple[str, ...] = ()
    for death in DEATHS[kind]:
        _dies(launch, kind, death, (*every, *resume))
        assert not (tmp_path / "out").exists()
        resume = ("--resume",)
    _succeeds(launch(kind, "out", 2, more=(*every, *resume)))
    _same_bits(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", DEATHS)
def test_a_death_at_every_step(launch, tmp_path, kind, rank):
    """Of nine: each sitting gets one step further than the one before."""
    every = ("--checkpoint-every", "1")
    _succeeds(launch(kind, "whole", 2))
    for step in range(1, 10):
        _dies(launch, kind, (rank, "block", 1 + (step > 1)), (*every, *(("--resume",) if step > 2 else ())))
    _succeeds(launch(kind, "out", 2, more=(*every, "--resume")))
    _same_bits(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["train", "train-shared"])
def test_another_number_of_processes_continues_a_checkpoint(launch, tmp_path, kind):
    _dies(launch, kind, (1, "block", 6), ("--checkpoint-every", "3"))
    files = sorted(file.name for file in (tmp_path / "out.run" / "checkpoint").iterdir())
    assert files == ["state.0.safetensors", "state.1.safetensors", "state.json"]
    _succeeds(launch(kind, "out", 3, more=("--checkpoint-every", "3", "--resume")))
    _succeeds(launch(kind, "whole"))
    _assert_equal_to_rounding(_result(tmp_path / "out"), _result(tmp_path / "whole"))


def test_fewer_rows_than_processes_is_said_by_all(launch):
    for code, printed, _ in launch("finetune", "out", 5):
        assert code == 2
        assert "batch_size: expected at least a row for each of 5 processes, got 4" in printed


def test_alone_everything_is_the_own():
    alone = processes()
    assert type(alone) is Processes
    assert (alone.rank, alone.size, alone.first) == (0, 1, True)
    assert alone.gather("x") == ["x"]
    assert alone.broadcast("x") == "x"
    assert alone.share(7) == slice(0, 7)
    columns = [torch.ones(2, 3)]
    alone.add(columns)
    assert torch.equal(alone.regroup(columns, [2])[0], torch.ones(2, 3))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_once(size):
    for n in range(10):
        members = [Processes() for _ in range(size)]
        for rank, member in enumerate(members):
            member.rank, member.size = rank, size
        shares = [member.share(n) for member in members]
        assert [i for share in shares for i in range(n)[share]] == list(range(n))
        assert shares == [members[0].share(n, rank) for rank in range(size)]


def test_a_wrong_timeout_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("FASTTC_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="FASTTC_TIMEOUT: expected a number of seconds >= 1, got 'soon'"):
        processes()


def test_others_that_do_not_come_are_lost(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {**settings, "FASTTC_TIMEOUT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessLost, match="has ended or did not answer in time"):
        processes()
