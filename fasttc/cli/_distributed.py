"""Verbs under ``torchrun``: the processes find each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fasttc.cli._common import Run


def check_alone() -> None:
    """For verbs that one process does.

    Raises:
        ValueError: torchrun started several.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise ValueError(f"expected one process, torchrun started {size}: call this verb without it")


@contextmanager
def processes(run: Run) -> Iterator[None]:
    """Joins the processes that torchrun started; each takes a GPU of its own where the device is ``cuda``."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    from torch import distributed

    if run.device == "cuda":
        run.device = f"cuda:{os.environ['LOCAL_RANK']}"
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()
