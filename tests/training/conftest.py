"""A tiny model, a little data, and runs short enough to repeat."""

import multiprocessing
import runpy
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasttc.training.data import TokenData

BOS = 2


def chains(n: int = 200, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Documents with something to learn: every token mostly fixes the next one."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(n):
        ids = [int(rng.integers(4, 61))]
        while len(ids) < rng.integers(10, longest):
            jump = int(rng.integers(4, 61))
            ids.append(jump if rng.random() < 0.1 else 4 + (3 * ids[-1] + 5) % 57)
        documents.append(ids)
    return documents


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads, and much slower beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data() -> TokenData:
    """Token-id documents for `tiny_model`, rows of 16."""
    return TokenData(chains(), context=16, bos_id=BOS, vocab_size=61)


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama")


@pytest.fixture
def interrupt() -> Callable[[int], Callable[[Any], None]]:
    """`interrupt(step)`: a callback that presses Ctrl-C after that step."""

    def make(step: int) -> Callable[[Any], None]:
        def callback(progress: Any) -> None:
            if progress.step == step:
                raise KeyboardInterrupt

        return callback

    return make


def assert_same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.fixture
def same_tensors() -> Callable[[Any, Any], None]:
    return assert_same_tensors


# Tests of several processes: forked from a server that has imported everything, so that each starts at once.

_PRELOADED = [
    "torch",
    "peft",
    "interp_engine.arch",
    "transformers.models.llama.modeling_llama",
    "fasttc.cli.train",
    "fasttc.training",
    "fasttc.evaluation",
]


@pytest.fixture(scope="session")
def fork() -> Callable[[str, list[dict[str, Any]]], list[tuple[int, str, float]]]:
    """``fork(script, jobs)``: runs a script beside this file in one process per job, with ``JOB`` in its globals.

    A job is given the environment of torchrun, and has to name the file of its "log". Gives, per process, its exit
    code, its log, and the seconds from the end of the first process to its own.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)

    def run(script: str, jobs: list[dict[str, Any]]) -> list[tuple[int, str, float]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "WORLD_SIZE": len(jobs),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "FASTTC_TIMEOUT": 30,
        }
        started = []
        for rank, job in enumerate(jobs):
            environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            job = {**job, "environment": {name: str(value) for name, value in environment.items()}}
            path = str(Path(__file__).with_name(script))
            started.append(context.Process(target=runpy.run_path, args=(path, {"JOB": job})))
            started[-1].start()
        seconds = _wait(started)
        logs = [Path(job["log"]).read_text() for job in jobs]
        return [(p.exitcode, log, s) for p, log, s in zip(started, logs, seconds, strict=True)]

    return run


def _wait(started: list[Any]) -> list[float]:
    """Waits two minutes at most, and kills what has not ended by then."""
    ended: dict[int, float] = {}
    limit = time.monotonic() + 120
    while len(ended) < len(started) and time.monotonic() < limit:
        for rank, process in enumerate(started):
            if rank not in ended and not process.is_alive():
                ended[rank] = time.monotonic()
        time.sleep(0.02)
    for process in started:
        process.kill()
        process.join()
    first = min(ended.values(), default=0.0)
    return [ended.get(rank, float("inf")) - first for rank in range(len(started))]
