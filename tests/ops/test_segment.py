"""segment: against loops in float64, with both gradients, and as the gradient of decode."""

from dataclasses import replace

import pytest
import torch

from fasttc import ops
from fasttc.ops.segment import transposed
from fasttc.testing import PATTERNS, assert_same_bits, assert_within_budget, draw, draw_acts

SHAPES = [  # N, K, F, D
    pytest.param((1, 1, 1, 1), id="one-of-each"),
    pytest.param((7, 3, 13, 5), id="primes"),
    pytest.param((5, 11, 11, 4), id="K=F"),
    pytest.param((0, 2, 5, 3), id="empty-batch"),
    pytest.param((33, 8, 130, 17), id="odd-of-blocks"),
]
LAYOUTS = pytest.mark.parametrize("csr", [False, True], ids=["padded", "csr"])


@LAYOUTS
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_by_hand(impl, shape, pattern, csr):
    n, k, f, d = shape
    acts = draw_acts(n, k, f, csr=csr, pattern=pattern, dtype=torch.float64)
    rows = draw("normal", n, d, dtype=torch.float64, seed=3)
    expected = torch.zeros(f, d, dtype=torch.float64)
    for token, (indices, values) in enumerate(acts):
        for feature, value in zip(indices.tolist(), values.tolist(), strict=True):
            expected[feature] += value * rows[token]
    got = ops.segment(acts, rows, impl=impl)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@LAYOUTS
def test_both_gradients(impl, csr):
    acts = draw_acts(6, 3, 9, csr=csr, dtype=torch.float64)
    rows = draw("normal", 6, 4, dtype=torch.float64, seed=3).requires_grad_()
    values = acts.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, r: ops.segment(replace(acts, values=v), r, impl=impl), (values, rows), nondet_tol=0.0
    )


@LAYOUTS
def test_is_the_gradient_of_decode(impl, csr):
    acts = draw_acts(12, 4, 20, csr=csr)
    W_dec = draw("normal", 20, 7, seed=3).requires_grad_()
    dy = draw("normal", 12, 7, seed=4)
    (grad,) = torch.autograd.grad(ops.decode(acts, W_dec, impl="reference"), W_dec, dy)
    exact = replace(acts, values=acts.values.double()).to_dense().T @ dy.double()
    assert_within_budget(ops.segment(acts, dy, impl=impl), exact, grad)


def test_leading_dimensions_are_flattened(impl):
    acts = replace(draw_acts(6, 3, 9), shape=(2, 3))
    rows = draw("normal", 6, 4, seed=3)
    flat = ops.segment(replace(acts, shape=(6,)), rows, impl=impl)
    assert_same_bits(ops.segment(acts, rows.reshape(2, 3, 4), impl=impl), flat)


@LAYOUTS
def test_transposed_twice_is_the_same_matrix(csr):
    acts = draw_acts(12, 4, 20, csr=csr)
    turned = transposed(acts)
    assert_same_bits(turned.to_dense().T.contiguous(), acts.to_dense())
    assert_same_bits(transposed(turned).to_dense(), acts.to_dense())
    assert all(bool((tokens.diff() > 0).all()) for tokens, _ in turned)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (None, TypeError, r"rows: expected a tensor \[6, 'D'\], got NoneType"),
        (torch.zeros(6), ValueError, r"rows: expected shape \[6, 'D'\], got \[6\]"),
        (torch.zeros(5, 4), ValueError, r"rows: expected shape \[6, 'D'\], got \[5, 4\]"),
        (
            torch.zeros(6, 4, dtype=torch.int64),
            TypeError,
            "rows: expected float16, bfloat16, float32 or float64",
        ),
    ],
)
def test_rows_that_do_not_fit(rows, error, message):
    with pytest.raises(error, match=message):
        ops.segment(draw_acts(6, 3, 9), rows)


def test_acts_must_be_sparse():
    with pytest.raises(TypeError, match="acts: expected SparseActs, got Tensor"):
        ops.segment(torch.zeros(3, 4), torch.zeros(3, 2))
