"""Every test of the ops runs with poisoned memory and, where it takes ``impl``, on each implementation."""

import pytest

from fasttc.testing import poison_empty


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poison_empty():
        yield


@pytest.fixture(params=["reference", "torch"])
def impl(request) -> str:
    return request.param
