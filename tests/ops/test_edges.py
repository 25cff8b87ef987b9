"""edges: against loops in float64, with and without the causal skip."""

import pytest
import torch
from torch import Tensor

from fasttc import ops
from fasttc.testing import assert_same_bits, assert_within_budget, draw

SHAPES = [  # B, T, D, F, n
    pytest.param((1, 1, 1, 1, 1), id="one-of-each"),
    pytest.param((5, 7, 3, 11, 23), id="primes"),
    pytest.param((0, 4, 3, 5, 6), id="no-targets"),
    pytest.param((3, 4, 3, 5, 0), id="no-sources"),
    pytest.param((33, 6, 17, 40, 65), id="odd-of-blocks"),
    pytest.param((4, 2, 3, 2, 50), id="repeated-sources"),
]


def problem(shape, dtype=torch.float64, seed=0) -> dict[str, Tensor]:
    b, t, d, f, n = shape
    generator = torch.Generator().manual_seed(seed)
    return {
        "G": draw("normal", b, t, d, dtype=dtype, seed=seed),
        "W_dec": draw("normal", f, d, dtype=dtype, seed=seed + 1),
        "features": torch.randint(0, f, (n,), generator=generator),
        "positions": torch.randint(0, t, (n,), generator=generator).sort().values,
        "activations": draw("normal", n, dtype=dtype, seed=seed + 2),
    }


def by_hand(G: Tensor, W_dec: Tensor, features: Tensor, positions: Tensor, activations: Tensor) -> Tensor:
    out = torch.zeros(G.shape[0], len(features), dtype=torch.float64)
    for b in range(G.shape[0]):
        for j, (f, t) in enumerate(zip(features.tolist(), positions.tolist(), strict=True)):
            out[b, j] = activations[j].double() * (G[b, t].double() * W_dec[f].double()).sum()
    return out


@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", SHAPES)
def test_by_hand(impl, shape, integers):
    given = problem(shape)
    expected = by_hand(**given)
    given |= {"features": given["features"].to(integers), "positions": given["positions"].to(integers)}
    got = ops.edges(**given, impl=impl)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(impl, dtype):
    given = problem((9, 5, 200, 31, 40), dtype)
    got = ops.edges(**given, impl=impl)
    assert got.dtype == torch.float32
    rows = given["W_dec"].float()[given["features"]] * given["activations"].float()[:, None]
    eager = (given["G"].float()[:, given["positions"]] * rows).sum(-1)
    assert_within_budget(got, by_hand(**given), eager)


@pytest.mark.parametrize("mixed", [torch.float32, torch.bfloat16])
def test_the_result_has_the_precision_of_the_gradients(impl, mixed):
    given = problem((3, 4, 5, 6, 7))
    given["W_dec"] = given["W_dec"].to(mixed)
    got, expected = ops.edges(**given, impl=impl), by_hand(**given)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_causal_skip_changes_nothing_and_leaves_exact_zeros(impl, shape):
    given = problem(shape)
    b, t = shape[:2]
    targets = torch.randint(0, t, (b,), generator=torch.Generator().manual_seed(3))
    causal = torch.arange(t)[None] <= targets[:, None]
    given["G"] *= causal[:, :, None]
    got = ops.edges(**given, target_positions=targets, impl=impl)
    torch.testing.assert_close(got, by_hand(**given), rtol=1e-12, atol=1e-12)
    after = given["positions"][None] > targets[:, None]
    assert bool((got[after] == 0).all())


def test_parameters_that_require_gradients_are_accepted_and_nothing_is_recorded(impl):
    given = problem((3, 4, 5, 6, 7))
    for name in ("G", "W_dec", "activations"):
        given[name].requires_grad_()
    got = ops.edges(**given, impl=impl)
    assert not got.requires_grad
    torch.testing.assert_close(got, by_hand(**given).detach(), rtol=1e-12, atol=1e-12)


def test_bitwise_equal_from_run_to_run(impl):
    first = ops.edges(**problem((33, 6, 17, 40, 65), torch.float32), impl=impl)
    for _ in range(3):
        assert_same_bits(ops.edges(**problem((33, 6, 17, 40, 65), torch.float32), impl=impl), first)


GOOD = problem((2, 4, 3, 6, 5), torch.float32)
BAD = [
    ({"G": torch.ones(2, 3)}, ValueError, r"G: expected shape \[B, T, D\], got \[2, 3\]"),
    ({"G": None}, TypeError, r"G: expected a tensor \[B, T, D\], got NoneType"),
    ({"G": torch.ones(2, 4, 3).int()}, TypeError, "G: expected float16, .* got torch.int32"),
    (
        {"W_dec": torch.ones(6, 2)},
        ValueError,
        r"W_dec: expected \[F, 3\] to match G \[2, 4, 3\], got \[6, 2\]",
    ),
    ({"W_dec": torch.ones(6)}, ValueError, r"W_dec: expected shape \[F, D\], got \[6\]"),
    ({"features": [1, 2]}, TypeError, r"features: expected a tensor \[n\], got list"),
    ({"features": torch.tensor(1)}, ValueError, r"features: expected shape \[n\], got \[\]"),
    ({"positions": torch.zeros(4).long()}, ValueError, r"positions: expected shape \[5\], got \[4\]"),
    ({"activations": torch.ones(6)}, ValueError, r"activations: expected shape \[5\], got \[6\]"),
    ({"features": torch.ones(5)}, TypeError, "features: expected integers, got torch.float32"),
    ({"positions": torch.ones(5)}, TypeError, "positions: expected integers, got torch.float32"),
    ({"features": torch.full((5,), 6)}, ValueError, r"features: expected values in \[0, 6\), got 6\.\.6"),
    ({"positions": torch.arange(5) - 1}, ValueError, r"positions: expected values in \[0, 4\), got -1\.\.3"),
    ({"positions": torch.tensor([0, 2, 1, 3, 3])}, ValueError, "positions: expected ascending values"),
    (
        {"target_positions": torch.zeros(3).long()},
        ValueError,
        r"target_positions: expected shape \[2\], got \[3\]",
    ),
    (
        {"target_positions": torch.zeros(2)},
        TypeError,
        "target_positions: expected integers, got torch.float32",
    ),
    ({"activations": torch.ones(5, device="meta")}, ValueError, "expected all tensors on one device, got"),
    ({"impl": "loop"}, ValueError, "impl: expected one of auto, reference, torch, triton, got 'loop'"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[match[:40] for _, _, match in BAD])
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        ops.edges(**{**GOOD, **change})
