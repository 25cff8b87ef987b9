"""Attribution: speed, memory, scaling and accuracy (``python -m benchmarks attribution --help``)."""

from .suite import main as main
