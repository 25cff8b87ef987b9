"""The clock of the suite."""

import time

import torch


def now() -> float:
    """Seconds: of CPU on one thread, wall-clock otherwise.

    The work never waits, so on one thread both are the same on an idle machine; on a busy one CPU time leaves out what
    others take.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
