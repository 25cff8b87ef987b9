"""RowAdam on every implementation: equal to AdamW on gradients from autograd, in float64 and to rounding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fasttc import ops
from fasttc.testing import assert_same_bits, assert_within_budget, draw, poison_empty

N, K, F, D, D_OUT = 5, 3, 9, 12, 20
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}
IMPLS = pytest.mark.parametrize("impl", ["reference", "torch", "triton"])


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    return draw("normal", F, D), draw("normal", F, seed=1, scale=0.1), draw("normal", F, D_OUT, seed=2)


def batch(t: int) -> tuple[Tensor, Tensor]:
    return draw("normal", N, D, seed=100 * t), draw("normal", N, D_OUT, seed=100 * t + 1)


def by_autograd(
    steps: int, dtype: torch.dtype, unit_norm: bool, encode: dict
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after AdamW on ``sum (decode - y)^2``, and the bias gradient and counts of every step."""
    W_enc, b_enc, W_dec = (t.to(dtype, copy=True).requires_grad_() for t in matrices())
    weights = [torch.nn.Parameter(W_enc.detach()), torch.nn.Parameter(W_dec.detach())]
    optimiser, notes = torch.optim.AdamW(weights, **OPTIONS), []
    for t in range(steps):
        x, y = (tensor.to(dtype) for tensor in batch(t))
        acts = ops.encode(x, weights[0], b_enc, impl="reference", **encode)
        loss = (ops.decode(acts, weights[1], impl="reference") - y).square().sum()
        *grads, bias = torch.autograd.grad(loss, [*weights, b_enc])
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        optimiser.step()
        if unit_norm:
            weights[1].data /= weights[1].data.norm(dim=1, keepdim=True)
        notes += [bias, (acts.to_dense() != 0).sum(0)]
    return [w.detach() for w in weights], notes


@IMPLS
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit-decoder"])
@pytest.mark.parametrize(
    ("encode", "relu"),
    [
        ({"k": K}, True),
        ({"k": K, "relu": False}, False),
        ({"k": 2, "scope": "batch"}, True),
        ({"threshold": 0.5}, True),
    ],
    ids=["topk", "topk-without-relu", "batchtopk", "jumprelu"],
)
def test_equal_to_adamw_on_gradients_from_autograd(encode, relu, unit_norm, impl):
    W_enc, b_enc, W_dec = matrices()
    adam = ops.RowAdam(W_enc, W_dec, unit_norm=unit_norm, weight_decay=0.1, eps=1e-8)
    notes = []
    for t in range(2):
        x, y = batch(t)
        acts = ops.encode(x, W_enc, b_enc, impl="reference", **encode)
        with poison_empty():
            error, _ = ops.residual(acts, W_dec, y, impl=impl)
            report = adam.step(acts, error, x, lr=1e-2, weight=2.0, relu=relu, impl=impl)
        notes += [report.grad_b_enc, report.counts]
    exact, eager = (by_autograd(2, dtype, unit_norm, encode) for dtype in (torch.float64, torch.float32))
    for name, got, oracle, plain in zip(("W_enc", "W_dec"), (W_enc, W_dec), exact[0], eager[0], strict=True):
        assert_within_budget(got, oracle, plain, name=name, eps=8 * torch.finfo(torch.float32).eps)
    for got, oracle, plain in zip(notes[::2], exact[1][::2], eager[1][::2], strict=True):
        assert_within_budget(got, oracle, plain, name="bias gradient", eps=8 * torch.finfo(torch.float32).eps)
    assert [n.tolist() for n in notes[1::2]] == [n.tolist() for n in exact[1][1::2]]


@IMPLS
def test_lazy_rows_leave_silent_features_alone_and_match_the_definition(impl):
    results = []
    for own in ("reference", impl):
        W_enc, b_enc, W_dec = matrices()
        b_enc = b_enc - 100 * (torch.arange(F) % 3 == 0)  # a third of the features never fire
        before = W_enc.clone(), W_dec.clone()
        adam = ops.RowAdam(W_enc, W_dec, lazy=True, weight_decay=0.1, shadow=torch.bfloat16)
        for t in range(3):
            x, y = batch(t)
            acts = ops.encode(x, W_enc, b_enc, k=2, impl="reference")
            adam.step(acts, ops.residual(acts, W_dec, y, impl=own)[0], x, lr=1e-2, impl=own)
        silent = adam.state["last_step"] == 0
        assert bool(silent.any())
        for weight, start in zip((W_enc, W_dec), before, strict=True):
            assert_same_bits(weight[silent], start[silent])
        for shadow, weight in ((adam.shadow_enc, W_enc), (adam.shadow_dec, W_dec)):
            assert_same_bits(shadow, weight.bfloat16())
        results.append([W_enc, W_dec, adam.state["last_step"]])
    for name, expected, got in zip(("W_enc", "W_dec", "last_step"), *results, strict=True):
        assert_within_budget(got.float(), expected.double(), expected.float(), name=name, eps=1e-6)


@IMPLS
def test_the_same_bits_every_time_and_resumed_from_its_state(impl):
    def run(resume: bool) -> list[Tensor]:
        W_enc, b_enc, W_dec = matrices()
        adam = ops.RowAdam(W_enc, W_dec)
        for t in range(2):
            x, y = batch(t)
            acts = ops.encode(x, W_enc, b_enc, k=K, impl="reference")
            adam.step(acts, ops.residual(acts, W_dec, y, impl=impl)[0], x, lr=1e-2, impl=impl)
            if resume:
                state, steps = {name: tensor.clone() for name, tensor in adam.state.items()}, adam.steps
                adam = ops.RowAdam(W_enc, W_dec)
                adam.state, adam.steps = state, steps
        return [W_enc, W_dec, *adam.state.values()]

    for once, again in zip(run(False), run(True), strict=True):
        assert_same_bits(again, once)


@IMPLS
def test_a_step_changes_neither_activations_nor_error(impl):
    W_enc, b_enc, W_dec = matrices()
    x, y = batch(0)
    acts = ops.encode(x, W_enc, b_enc, k=K, impl="reference")
    error, _ = ops.residual(acts, W_dec, y, impl="reference")
    before = [t.clone() for t in (acts.values, acts.indices, error, x)]
    ops.RowAdam(W_enc, W_dec).step(acts, error, x, lr=1e-2, impl=impl)
    for now, kept in zip((acts.values, acts.indices, error, x), before, strict=True):
        assert_same_bits(now, kept)


def test_what_does_not_fit_is_refused():
    W_enc, b_enc, W_dec = matrices()
    with pytest.raises(ValueError, match=r"W_dec: expected contiguous float32, got torch\.float64"):
        ops.RowAdam(W_enc, W_dec.double())
    with pytest.raises(ValueError, match="W_dec: expected 9 rows as W_enc, got 8"):
        ops.RowAdam(W_enc, W_dec[:8])
    adam = ops.RowAdam(W_enc, W_dec)
    x, y = batch(0)
    acts = ops.encode(x, W_enc, b_enc, k=K)
    with pytest.raises(ValueError, match="acts: expected 9 features, got 10"):
        adam.step(replace(acts, n_features=10), y, x, lr=1e-2)
    with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., 12\], got \[5, 20\]"):
        adam.step(acts, y, y, lr=1e-2)
    with pytest.raises(ValueError, match=r"error: expected shape \[5, 20\], got \[4, 20\]"):
        adam.step(acts, y[:4], x, lr=1e-2)
    assert adam.steps == 0
