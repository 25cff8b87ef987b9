"""CPU micro-benchmarks, for ``pytest benchmarks/ops/test_micro.py`` (needs pytest-benchmark; not part of the tests).

One small case of each op, ours against dense PyTorch: to see at a glance what a change of ``impl="torch"`` does.
"""

import pytest

from .registry import REGISTRY, Problem, draw

PROBLEM = Problem(256, 128, 4096, 16)


@pytest.mark.parametrize("competitor", ["fasttc", "dense"])
@pytest.mark.parametrize("op", REGISTRY)
def test_op(benchmark, op: str, competitor: str) -> None:
    benchmark.group = op
    benchmark(REGISTRY[op].competitors[competitor](draw(PROBLEM, "cpu", 0), PROBLEM.k).call)
