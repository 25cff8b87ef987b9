"""Losses over the vocabulary in pieces: the numbers and gradients of one piece, and never all logits at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fasttc.models import anatomy
from fasttc.testing import assert_within_budget, draw
from fasttc.training.divergence import Divergence


def log_probabilities(model, final):
    parts = anatomy(model)
    logits = model.get_submodule(parts.lm_head)(final)
    cap = parts.final_softcap
    return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)


def kl_by_hand(model, final, reference):
    p, q = log_probabilities(model, final), log_probabilities(model, reference)
    return (q.exp() * (q - p)).sum()


@pytest.fixture
def models(tiny_model):
    """The same soft-capped model in float32 and in float64."""
    return [
        tiny_model("gemma2", dtype=dtype).requires_grad_(False) for dtype in (torch.float32, torch.float64)
    ]


def inputs(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    final, reference = (draw("normal", n, 32, seed=seed).to(dtype) for seed in (0, 1))
    return final.requires_grad_(), reference


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_kl_and_its_gradient_in_pieces(models, n, rows):
    values, gradients = [], []
    for model, compute in (
        (models[0], Divergence(models[0], rows).kl),
        (models[1], lambda *pair: kl_by_hand(models[1], *pair)),
        (models[0], lambda *pair: kl_by_hand(models[0], *pair)),
    ):
        final, reference = inputs(n, model.dtype)
        values.append(compute(final, reference))
        gradients.append(torch.autograd.grad(3 * values[-1], final)[0])
    assert_within_budget(*values, magnitude=float(n))
    assert_within_budget(*gradients)


def test_cross_entropy_in_pieces(models):
    labels = torch.arange(7)
    values, gradients = [], []
    for model, compute in (
        (models[0], lambda final: Divergence(models[0], 3).cross_entropy(final, labels)),
        (models[1], lambda final: -log_probabilities(models[1], final)[labels, labels].sum()),
        (models[0], lambda final: -log_probabilities(models[0], final)[labels, labels].sum()),
    ):
        final, _ = inputs(7, model.dtype)
        values.append(compute(final))
        gradients.append(torch.autograd.grad(values[-1], final)[0])
    assert_within_budget(*values)
    assert_within_budget(*gradients)


def test_equal_models_do_not_diverge(tiny_model):
    final = draw("normal", 7, 32)
    divergence = Divergence(tiny_model("llama"), 3)
    assert float(divergence.kl(final, final)) == 0
    assert divergence.disagreement(final, final) == 0
    assert divergence.disagreement(final, -final) > 0


class _Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_all_logits_never_exist_at_once(tiny_model):
    """61 words, 200 rows, 10 at a time: nothing larger than the outputs of the trunk, forward and backward."""
    divergence = Divergence(tiny_model("llama").requires_grad_(False), 10)
    final = draw("normal", 200, 32).requires_grad_()
    with _Largest() as largest:
        divergence.kl(final, draw("normal", 200, 32, seed=1)).backward()
    assert largest.numel == 200 * 32 < 200 * 61
