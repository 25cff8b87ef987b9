"""Losses against plain float64 formulas, values and gradients."""

import pytest
import torch

from fasttc.ops import encode
from fasttc.training import losses


def leaf(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def gradients(value, *inputs):
    return torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)


def test_normalised_mse():
    prediction, y = leaf(7, 5), leaf(7, 5, seed=1).detach() + 3
    got = losses.normalised_mse(prediction, y)
    rows = [sum((prediction[t, d] - y[t, d]) ** 2 for d in range(5)) for t in range(7)]
    mean = y.sum(0) / 7
    spread = sum(((y[t] - mean) ** 2).sum() for t in range(7))
    torch.testing.assert_close(got, sum(rows) / spread)
    torch.testing.assert_close(gradients(got, prediction)[0], 2 * (prediction - y) / spread)
    constant = y.mean(0).expand_as(y)
    torch.testing.assert_close(losses.normalised_mse(constant, y), torch.ones((), dtype=torch.float64))


def test_normalised_mse_is_free_of_units():
    prediction, y = leaf(7, 5), leaf(7, 5, seed=1)
    one, two = losses.normalised_mse(prediction, y), losses.normalised_mse(1e4 * prediction + 5, 1e4 * y + 5)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("k", [1, 3, 6, 9])
def test_auxk(k):
    x, residual = leaf(8, 4).detach(), leaf(8, 5, seed=1)
    W_enc, b_enc, W_dec = leaf(6, 4, seed=2), leaf(6, seed=3), leaf(6, 5, seed=4)
    got = losses.auxk(x, residual, W_enc, b_enc, W_dec, k)
    total, norm = 0.0, 0.0
    for t in range(8):
        z = W_enc @ x[t] + b_enc
        chosen = sorted(range(6), key=lambda i: -z[i].item())[:k]
        guess = sum(z[i].clamp(min=0) * W_dec[i] for i in chosen)
        total = total + ((residual[t].detach() - guess) ** 2).sum()
        norm = norm + (residual[t].detach() ** 2).sum()
    torch.testing.assert_close(got, total / norm)
    for ours, theirs in zip(
        gradients(got, W_enc, b_enc, W_dec), gradients(total / norm, W_enc, b_enc, W_dec), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().max() > 0
    assert gradients(got, residual)[0] is None


def test_l1_and_its_gradient_through_decoder_norms():
    x, W_enc, b_enc, W_dec = leaf(5, 4).detach(), leaf(6, 4, seed=2), leaf(6, seed=3), leaf(6, 5, seed=4)
    acts = encode(x, W_enc, b_enc, threshold=0.0)
    got = losses.l1(acts, W_dec, torch.tensor(2.0, dtype=torch.float64))
    dense = (x @ W_enc.T + b_enc).relu()
    expected = (dense * W_dec.square().sum(1).sqrt()).sum(1).mean() / 2
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        gradients(got, W_enc, b_enc, W_dec), gradients(expected, W_enc, b_enc, W_dec), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    shrunk = encode(x, W_enc / 10, b_enc / 10, threshold=0.0)
    torch.testing.assert_close(losses.l1(shrunk, 10 * W_dec, torch.tensor(2.0)), got)


def test_l0_distance_has_the_rectangle_gradient():
    x, W_enc, b_enc = leaf(50, 4).detach(), leaf(6, 4, seed=2), leaf(6, seed=3)
    theta = torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
    width, target = 0.5, 1.5
    acts = encode(x, W_enc, b_enc, threshold=theta, bandwidth=width)
    got = losses.l0_distance(acts.l0().mean(), target)
    z = x @ W_enc.T + b_enc
    l0 = (z > theta).double().sum(1).mean()
    torch.testing.assert_close(got, (l0 / target - 1) ** 2)
    near = ((z - theta).abs() < width / 2).double().sum(0)
    expected = 2 * (l0 / target - 1) / target * (-near / width / 50)
    torch.testing.assert_close(gradients(got, theta)[0], expected)
    assert expected.abs().max() > 0
