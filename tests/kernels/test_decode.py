"""The decode kernel against the float64 oracle: layouts, dtypes, epilogues, cuts; what its sums must not depend on."""

from itertools import pairwise

import pytest
import torch

from fasttc.kernels._launch import config
from fasttc.kernels.decode import launch_decode
from fasttc.ops import SparseActs, reference
from fasttc.testing import PATTERNS, assert_same_bits, assert_within_budget, draw, draw_acts, poison_empty

SHAPES = [  # N, K, F, D
    pytest.param((1, 1, 1, 1), id="one-of-each"),
    pytest.param((7, 3, 13, 37), id="primes"),
    pytest.param((3, 5, 5, 33), id="K=F"),
    pytest.param((0, 2, 5, 8), id="empty-batch"),
    pytest.param((3, 11, 29, 520), id="odd-of-blocks"),
]
LAYOUTS = pytest.mark.parametrize("csr", [False, True], ids=["padded", "csr"])
# Rows of more than 3 entries are long, blocks of 2 do not divide the pieces, and 32 columns make many slices.
CUTTING = config(num_warps=1, num_stages=1, BLOCK_D=32, ROWS=2, STAGES=1, CUT=3)


def run(acts: SparseActs, W, bias=None, init=None, target=None, config=None):
    with poison_empty():
        return launch_decode(
            acts.values, acts.indices, acts.row_ptr, W, bias=bias, init=init, target=target, config=config
        )


def in_dtype(acts: SparseActs, dtype: torch.dtype) -> SparseActs:
    return SparseActs(acts.values.to(dtype), acts.indices, acts.n_features, acts.shape, acts.row_ptr)


def check(got, acts: SparseActs, W, bias=None, init=None, target=None) -> None:
    oracle, eager = (
        reference.decode(in_dtype(acts, dtype), W, bias, init) for dtype in (torch.float64, torch.float32)
    )
    if target is not None:
        oracle, eager = oracle - target.double(), eager - target.float()
    largest = (
        float((in_dtype(acts, torch.float64).to_dense().abs() @ W.double().abs()).max())
        if got.numel()
        else 0.0
    )
    assert_within_budget(got, oracle, eager, magnitude=largest)


@LAYOUTS
@pytest.mark.parametrize("cutting", [None, CUTTING], ids=["default", "cutting"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle(shape, cutting, csr):
    n, k, f, d = shape
    acts = draw_acts(n, k, f, csr=csr)
    W = draw("normal", f, d, seed=3)
    got, squares = run(acts, W, config=cutting)
    assert squares is None
    check(got, acts, W)


@LAYOUTS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_indices(pattern, csr):
    acts = draw_acts(9, 6, 31, csr=csr, pattern=pattern)
    W = draw("heavy_tailed", 31, 40, seed=3)
    check(run(acts, W, config=CUTTING)[0], acts, W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@LAYOUTS
def test_every_dtype_and_epilogue(csr, dtype):
    n, d = 6, 67
    acts = draw_acts(n, 4, 19, csr=csr)
    W, bias = draw("normal", 19, d, dtype=dtype, seed=3), draw("normal", d, dtype=dtype, seed=4)
    init, target = (draw("normal", n, d, dtype=dtype, seed=seed) for seed in (5, 6))
    for cutting in (None, CUTTING):
        check(run(acts, W, bias, init, config=cutting)[0], acts, W, bias, init)
        error, squares = run(acts, W, bias, init, target, config=cutting)
        check(error, acts, W, bias, init, target)
        oracle = (
            (reference.decode(in_dtype(acts, torch.float64), W, bias, init) - target.double())
            .square()
            .sum(-1)
        )
        assert_within_budget(
            squares, oracle, error.square().sum(-1), eps=4 * d * torch.finfo(torch.float32).eps
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_and_result(dtype):
    acts = draw_acts(5, 4, 19, dtype=dtype)
    W = draw("normal", 19, 24, dtype=dtype, seed=3)
    with poison_empty():
        got, _ = launch_decode(acts.values, acts.indices, None, W, dtype=dtype)
    oracle, eager = (
        reference.decode(in_dtype(acts, wide), W, None, None) for wide in (torch.float64, torch.float32)
    )
    assert_within_budget(got, oracle, eager.to(dtype))


@LAYOUTS
def test_the_same_bits_every_time_and_in_any_company(csr):
    acts = draw_acts(4, 8, 23, csr=csr)
    W = draw("normal", 23, 33, seed=3)
    first, _ = run(acts, W, config=CUTTING)
    for _ in range(9):
        assert_same_bits(run(acts, W, config=CUTTING)[0], first)
    bounds = [8 * row for row in range(5)] if acts.row_ptr is None else acts.row_ptr.tolist()
    for row, (start, stop) in enumerate(pairwise(bounds)):
        values, indices = acts.values.flatten()[start:stop], acts.indices.flatten()[start:stop]
        if csr:
            alone = SparseActs(values, indices, 23, (1,), torch.tensor([0, stop - start]))
        else:
            alone = SparseActs(values[None], indices[None], 23, (1,))
        assert_same_bits(run(alone, W, config=CUTTING)[0][0], first[row], name=f"row {row} alone")


def test_padding_with_zeros_changes_no_bit():
    acts = draw_acts(4, 7, 23)
    W = draw("normal", 23, 50, seed=3)
    padded = SparseActs(
        torch.cat([acts.values, torch.zeros(4, 5)], 1),
        torch.cat([acts.indices, acts.indices[:, :5]], 1),
        23,
        (4,),
    )
    tight = config(num_warps=1, num_stages=1, BLOCK_D=64, ROWS=4, STAGES=1, CUT=64)
    assert_same_bits(run(padded, W, config=tight)[0], run(acts, W, config=tight)[0])


def test_rows_without_entries_give_the_bias():
    acts = SparseActs(
        torch.zeros(0), torch.zeros(0, dtype=torch.int32), 3, (4,), torch.zeros(5, dtype=torch.int64)
    )
    bias = draw("normal", 6)
    got, _ = run(acts, torch.full((3, 6), torch.nan), bias)
    assert_same_bits(got, bias.expand(4, 6).contiguous())


def test_strided_rows_are_read_in_place():
    acts = draw_acts(5, 3, 11)
    wide = draw("normal", 11, 80, seed=3)
    check(run(acts, wide[:, 16:50])[0], acts, wide[:, 16:50])


def test_rows_beyond_2_to_the_31_elements(huge, overflow_checked):
    d = 4096
    W = huge(2**31 // d + 9, d, dtype=torch.float16)
    f = W.shape[0]
    indices = torch.tensor([[0, f - 2], [f - 9, f - 1]], dtype=torch.int32)
    W[indices.flatten().long()] = draw("normal", 4, d, dtype=torch.float16, seed=3)
    values = draw("normal", 2, 2, seed=4)
    got, _ = launch_decode(values, indices, None, W)
    rows = W[indices.long()].double()
    oracle = (values.double()[..., None] * rows).sum(1)
    assert_within_budget(got, oracle, (values[..., None] * rows.float()).sum(1))
