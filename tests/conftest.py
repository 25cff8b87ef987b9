"""Shared fixtures. Reference data lives outside the project and is optional: tests that need it skip without it."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(min(2, os.cpu_count() or 1))

SHARED_DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """Folder of reference models, texts and oracle graphs; skips the test where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"reference data not found at {SHARED_DATA}")
    return SHARED_DATA.resolve()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
