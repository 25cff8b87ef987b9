"""Adam against the textbook, clipping by group, masters, and a state that continues bit for bit."""

import pytest
import torch

from fasttc.training.optimiser import Group, Optimiser, check_schedule, schedule


def test_schedule():
    rates = [schedule(i, 10, 2, "linear") for i in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == pytest.approx([1 - i / 8 for i in range(8)])
    assert [schedule(i, 10, 0, "constant") for i in range(10)] == [1.0] * 10
    cosine = [schedule(i, 10, 0, "cosine") for i in range(11)]
    assert cosine[::5] == pytest.approx([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="expected one of cosine, linear, constant, got 'step'"):
        check_schedule("step")


def textbook(parameter, grads, rates, clip, betas=(0.9, 0.999), eps=1e-10):
    p, m, v = parameter.double(), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
        g = g.double() * min(1.0, clip / float(g.double().norm()))
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p = p - rate * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_with_clipping_and_masters(dtype):
    start = torch.randn(5, 3).to(dtype)
    grads = [torch.randn(5, 3).to(dtype) for _ in range(20)]
    parameter = start.clone().requires_grad_()
    optimiser = Optimiser([Group({"w": parameter}, {"w": 0.5})], clip=1.0)
    for g in grads:
        parameter.grad = g.clone()
        optimiser.step(2e-3)
        assert parameter.grad is None
    # The clipped norm is that of the scaled parameters: half the plain one.
    expected = textbook(start, grads, [1e-3] * 20, clip=2.0)
    precise = optimiser.state()["w.master"]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # bfloat16 gradients are clipped in place
    torch.testing.assert_close(precise.double(), expected, rtol=0, atol=tolerance * 20)
    assert torch.equal(parameter, precise.to(dtype))


def test_masters_keep_what_bfloat16_would_lose():
    parameter = torch.full((4,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    optimiser = Optimiser([Group({"w": parameter})], clip=None)
    for _ in range(50):
        parameter.grad = torch.ones_like(parameter)
        optimiser.step(1e-3)  # a tenth of the spacing of bfloat16 below one
    assert float(parameter.detach().float().mean()) == pytest.approx(0.95, abs=0.005)


def test_groups_are_clipped_apart():
    one, two = (torch.zeros(3, requires_grad=True) for _ in range(2))
    optimiser = Optimiser([Group({"a": one}), Group({"b": two})], clip=1.0)
    one.grad, two.grad = torch.full((3,), 1e6), torch.full((3,), 0.1)
    optimiser._clip_group(optimiser._groups[0], 1.0)
    optimiser._clip_group(optimiser._groups[1], 1.0)
    assert one.grad.norm() == pytest.approx(1.0)
    assert torch.equal(two.grad, torch.full((3,), 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_optimiser_continues_bit_for_bit(dtype):
    grads = [torch.randn(4, 3).to(dtype) for _ in range(9)]
    start = torch.randn(4, 3).to(dtype)

    def advance(optimiser, parameter, part):
        for g in part:
            parameter.grad = g.clone()
            optimiser.step(1e-2)

    whole = start.clone().requires_grad_()
    first = Optimiser([Group({"w": whole})])
    advance(first, whole, grads[:4])
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    advance(first, whole, grads[4:])

    other = torch.zeros_like(start).requires_grad_()
    second = Optimiser([Group({"w": other})])
    second.restore(saved)
    advance(second, other, grads[4:])
    assert torch.equal(whole, other)
    for name, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[name]), name
