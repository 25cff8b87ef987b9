"""A tiny model, a little data, and runs short enough to repeat."""

from collections.abc import Callable, Iterator
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
