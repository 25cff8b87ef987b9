"""The helpers that other tests trust must themselves be able to fail."""

import threading

import pytest
import torch

from fasttc.testing import (
    KINDS,
    PATTERNS,
    assert_same_bits,
    assert_within_budget,
    draw,
    draw_acts,
    draw_coder,
    poison_empty,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_accepts_another_order_of_summation(dtype):
    a, b = draw("normal", 17, 301, dtype=dtype), draw("normal", 301, 13, dtype=dtype, seed=1)
    oracle = a.double() @ b.double()
    other = (a.flip(1).float() @ b.flip(0).float()).to(dtype)
    assert_within_budget(other, oracle, a @ b, name="product")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["one element", "everything a little"])
def test_budget_rejects_errors_beyond_rounding(dtype, wrong):
    oracle = draw("normal", 40, 50, dtype=torch.float64).clamp(-2, 2)
    eager = oracle.to(dtype)
    got, eps = eager.clone(), torch.finfo(dtype).eps
    if wrong == "one element":
        got[3, 7] += 16 * eps
        match = r"product: largest error .* worst at \(3, 7\): got"
    else:
        # Small enough for the largest error's budget, too systematic for the mean's.
        oracle = torch.ones(64, dtype=torch.float64)
        eager, got = oracle.to(dtype), oracle.to(dtype)
        oracle[0] = 1 + 20 * eps
        got[1:] += 4 * eps
        match = "product: mean error"
    with pytest.raises(AssertionError, match=match):
        assert_within_budget(got, oracle, eager, name="product")


def test_budget_rejects_nan_shape_and_dtype():
    oracle = torch.zeros(2, 3, dtype=torch.float64)
    eager = torch.zeros(2, 3)
    holed = eager.clone()
    holed[1, 2] = float("nan")
    with pytest.raises(AssertionError, match=r"worst at \(1, 2\): got nan"):
        assert_within_budget(holed, oracle, eager)
    with pytest.raises(AssertionError, match=r"got shape \[3, 2\], the oracle has \[2, 3\]"):
        assert_within_budget(torch.zeros(3, 2), oracle, eager)
    with pytest.raises(AssertionError, match=r"got torch.float16, the eager result is torch.float32"):
        assert_within_budget(eager.half(), oracle, eager)
    with pytest.raises(AssertionError, match="expected an oracle in float64"):
        assert_within_budget(eager, eager, eager)
    assert_within_budget(torch.empty(0, 3), torch.empty(0, 3).double(), torch.empty(0, 3))


def test_budget_wants_infinities_where_the_oracle_has_them():
    oracle = torch.tensor([1.0, float("inf")], dtype=torch.float64)
    assert_within_budget(oracle.float(), oracle, oracle.float())
    with pytest.raises(AssertionError, match="largest error inf"):
        assert_within_budget(torch.tensor([1.0, 5.0]), oracle, oracle.float())


def test_same_bits_tells_signed_zeros_apart():
    nan = torch.tensor([float("nan"), 0.0])
    assert_same_bits(nan, nan.clone())
    with pytest.raises(
        AssertionError, match=r"1 of 4 elements differ, first at \(1, 0\): got -0.0, expected 0.0"
    ):
        assert_same_bits(torch.tensor([[0.0, 0.0], [-0.0, 0.0]]), torch.zeros(2, 2))
    with pytest.raises(AssertionError, match="float16"):
        assert_same_bits(torch.zeros(2), torch.zeros(2).half())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_are_seeded_and_in_the_dtype(kind, dtype):
    first, again = draw(kind, 5, 7, dtype=dtype, seed=3), draw(kind, 5, 7, dtype=dtype, seed=3)
    assert_same_bits(first, again)
    assert first.dtype == dtype
    assert bool(first.isfinite().all())
    assert draw(kind, 0, 7, dtype=dtype).shape == (0, 7)
    with pytest.raises(ValueError, match="kind: expected one of normal"):
        draw("odd", 2)


def test_coder_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in draw_coder(7, 3, 5).items()}
    assert shapes == {"W_enc": (7, 3), "b_enc": (7,), "W_dec": (7, 5), "b_dec": (5,)}


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_acts_follow_the_pattern(pattern, csr):
    acts = draw_acts(40, 3, 11, pattern=pattern, csr=csr)
    rows = [acts.indices[acts.tokens == token].tolist() for token in range(40)]
    assert all(row == sorted(row) for row in rows)
    if pattern == "duplicates":
        assert any(len(set(row)) < len(row) for row in rows)
    else:
        assert all(len(set(row)) == len(row) for row in rows)
    if pattern == "few_features":
        assert int(acts.indices.max()) < 3
    if pattern == "one_feature" and not csr:
        assert all(5 in row for row in rows)
    if csr:
        assert {0, 3} <= {len(row) for row in rows}
    with pytest.raises(ValueError, match="pattern: expected one of uniform"):
        draw_acts(2, 1, 3, pattern="odd")


def test_poison_reaches_every_maker_and_every_thread_and_is_lifted():
    seen: list[torch.Tensor] = []
    base = torch.zeros(2, 3)
    with poison_empty():
        thread = threading.Thread(target=lambda: seen.append(torch.empty(4)))
        thread.start()
        thread.join()
        seen += [torch.empty_like(base), torch.empty_strided((2,), (1,)), base.new_empty(3)]
        seen += [base.new_empty_strided((2, 2), (2, 1)), torch.empty(2, dtype=torch.bfloat16)]
        assert all(bool(tensor.isnan().all()) for tensor in seen)
        assert int(torch.empty(2, dtype=torch.int32).min()) > 2**30
        assert bool(torch.empty(2, dtype=torch.bool).all())
    assert "new_empty" not in vars(torch.Tensor)
    torch.empty(3).fill_(0)
    assert not bool(torch.empty_like(base).fill_(0).isnan().any())
