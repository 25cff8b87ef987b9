"""Kernels run in Triton's interpreter where there is no GPU: the switch must be set before Triton is imported."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from fasttc.testing import poison_empty

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "Triton was imported before tests/kernels could set TRITON_INTERPRET=1: set it for the whole run, or run "
            "tests/kernels in a process of its own"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _default_device() -> Iterator[None]:
    """Where there is a GPU, everything a test makes is made there."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: a GPU, or a CPU with the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is full of NaN: an output that a kernel forgets to write cannot pass for a zero."""
    with poison_empty():
        yield


@pytest.fixture
def overflow_checked():
    """Integer arithmetic of the interpreter raises where it would wrap, as it would on a GPU."""
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    before = options.debug
    object.__setattr__(options, "debug", True)
    yield
    object.__setattr__(options, "debug", before)


_unpoisoned_empty = torch.empty


@pytest.fixture
def huge():
    """Makes tensors of more than 2^31 elements: virtual memory only, until it is written to (so never poisoned)."""

    def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        try:
            return _unpoisoned_empty(*shape, dtype=dtype)
        except RuntimeError as error:
            pytest.skip(f"no room for {shape} of {dtype}: {error}")

    return make
