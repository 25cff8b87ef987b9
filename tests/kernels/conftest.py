"""Kernels run in Triton's interpreter where there is no GPU: the switch must be set before Triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def overflow_checked():
    """Integer arithmetic of the interpreter raises where it would wrap, as it would on a GPU."""
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    before = options.debug
    object.__setattr__(options, "debug", True)
    yield
    object.__setattr__(options, "debug", before)


@pytest.fixture
def huge():
    """Makes tensors of more than 2^31 elements: virtual memory only, until it is written to."""

    def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        try:
            return torch.empty(*shape, dtype=dtype)
        except RuntimeError as error:
            pytest.skip(f"no room for {shape} of {dtype}: {error}")

    return make
