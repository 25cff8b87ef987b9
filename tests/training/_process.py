"""One of several processes of a test: joins the others, runs a command of fasttc, and dies on demand.

Run by ``runpy`` in a forked process, with ``JOB`` in its globals: see ``launch`` in ``test_distributed.py``.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

JOB: dict = globals().get("JOB", {})


def dies_at(what: str, call: int) -> None:
    """From now on this process kills itself, as a power cut would, at a call: of a block, an update, a write."""
    from fasttc.nn import rows
    from fasttc.training import checkpoint
    from fasttc.training.data import TokenStream
    from fasttc.training.optimiser import Optimiser

    place, name = {
        "block": (TokenStream, "next"),
        "update": (Optimiser, "step"),
        "checkpoint": (checkpoint, "_save_tensors"),
        "result": (rows, "write_rows"),
    }[what]
    original: Callable[..., Any] = getattr(place, name)
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(place, name, counted)


def run() -> None:
    os.environ.update(JOB["environment"])
    with open(JOB["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import torch

    from fasttc.cli.__main__ import main

    torch.set_num_threads(1)
    if JOB["dies_at"] is not None:
        dies_at(*JOB["dies_at"])
    main(JOB["arguments"])
    sys.exit(0)


if JOB:
    run()
