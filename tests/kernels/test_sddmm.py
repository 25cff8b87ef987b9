"""The products at the entries, against the dense product in float64."""

import pytest
import torch

from fasttc.kernels._launch import config
from fasttc.kernels.sddmm import launch_sddmm
from fasttc.ops import SparseActs
from fasttc.testing import PATTERNS, assert_same_bits, assert_within_budget, draw, draw_acts, poison_empty

SHAPES = [  # N, K, F, D
    pytest.param((1, 1, 1, 1), id="one-of-each"),
    pytest.param((7, 3, 13, 37), id="primes"),
    pytest.param((3, 5, 5, 33), id="K=F"),
    pytest.param((0, 2, 5, 8), id="empty-batch"),
    pytest.param((3, 11, 29, 520), id="odd-of-blocks"),
]
LAYOUTS = pytest.mark.parametrize("csr", [False, True], ids=["padded", "csr"])
SMALL = config(num_warps=1, num_stages=1, BLOCK_K=2, BLOCK_D=32, SPLIT=2)


def run(left, table, acts: SparseActs, config=None):
    with poison_empty():
        return launch_sddmm(left, table, acts.indices, acts.row_ptr, config=config)


def check(got, left, table, acts: SparseActs) -> None:
    entries = (acts.tokens.reshape(-1), acts.indices.reshape(-1).long())
    oracle, eager = (
        (left.to(t) @ table.to(t).T)[entries].reshape(got.shape) for t in (torch.float64, torch.float32)
    )
    largest = float((left.double().abs() @ table.double().abs().T).max()) if left.numel() else 0.0
    assert_within_budget(got, oracle, eager, magnitude=largest)


@LAYOUTS
@pytest.mark.parametrize("blocks", [None, SMALL], ids=["default", "small"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle(shape, blocks, csr):
    n, k, f, d = shape
    acts = draw_acts(n, k, f, csr=csr)
    left, table = draw("normal", n, d), draw("normal", f, d, seed=3)
    check(run(left, table, acts, blocks), left, table, acts)


@LAYOUTS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_indices(pattern, csr):
    acts = draw_acts(9, 6, 31, csr=csr, pattern=pattern)
    left, table = draw("heavy_tailed", 9, 40), draw("normal", 31, 40, seed=3)
    check(run(left, table, acts, SMALL), left, table, acts)


@pytest.mark.parametrize("right", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("left", [torch.float32, torch.bfloat16, torch.float16])
def test_every_pair_of_dtypes(left, right):
    acts = draw_acts(4, 3, 11)
    rows, table = draw("normal", 4, 35, dtype=left), draw("normal", 11, 35, dtype=right, seed=3)
    check(run(rows, table, acts), rows, table, acts)


@LAYOUTS
def test_the_same_bits_every_time_and_in_any_company(csr):
    acts = draw_acts(4, 8, 23, csr=csr)
    left, table = draw("normal", 4, 40), draw("normal", 23, 40, seed=3)
    first = run(left, table, acts, SMALL)
    for _ in range(9):
        assert_same_bits(run(left, table, acts, SMALL), first)
    rows, indices = left[acts.tokens.flatten().flip(0)], acts.indices.flatten().flip(0)
    alone = SparseActs(acts.values.flatten()[:, None], indices[:, None], 23, (len(rows),))
    assert_same_bits(run(rows, table, alone, SMALL).flatten().flip(0), first.flatten())


def test_strided_operands_are_read_in_place():
    acts = draw_acts(5, 3, 11)
    left, table = draw("normal", 5, 60)[:, 7:31], draw("normal", 11, 80, seed=3)[:, 16:40]
    check(run(left, table, acts), left, table, acts)


def test_rows_beyond_2_to_the_31_elements(huge, overflow_checked):
    d = 4096
    table = huge(2**31 // d + 9, d, dtype=torch.float16)
    indices = torch.tensor([[table.shape[0] - 2], [table.shape[0] - 1]], dtype=torch.int32)
    table[indices.flatten().long()] = draw("normal", 2, d, dtype=torch.float16, seed=3)
    left = draw("normal", 2, d)
    got = launch_sddmm(left, table, indices, None)
    products = left.double() * table[indices.flatten().long()].double()
    eager = (left * table[indices.flatten().long()].float()).sum(-1, keepdim=True)
    assert_within_budget(
        got, products.sum(-1, keepdim=True), eager, magnitude=float(products.abs().sum(-1).max())
    )
