"""One of several processes of a test: joins the others, runs a command of fasttc, and dies on demand.

Run by ``runpy`` in a forked process, with ``JOB`` in its globals: see ``launch`` in ``test_distributed.py``.
"""

import os
import signal
import sys

JOB: dict = globals().get("JOB", {})


def dies_at(step: int) -> None:
    """From now on this process kills itself, as a power cut would, where it asks for the block of a step."""
    from fasttc.training.data import TokenStream

    original = TokenStream.next
    calls: list[int] = []

    def next_block(self):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    TokenStream.next = next_block


def run() -> None:
    os.environ.update(JOB["environment"])
    with open(JOB["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import torch

    from fasttc.cli.__main__ import main

    torch.set_num_threads(1)
    if JOB["dies_at"] is not None:
        dies_at(JOB["dies_at"])
    main(JOB["arguments"])
    sys.exit(0)


if JOB:
    run()
