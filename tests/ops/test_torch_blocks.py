"""impl="torch" cuts its work into blocks: with tiny blocks every seam is crossed, and the oracle sees no difference."""

import pytest
import torch

from fasttc import ops
from fasttc.ops import _torch
from fasttc.testing import KINDS, assert_within_budget, draw, draw_coder

N, D, F, K = 11, 8, 600, 3


@pytest.fixture(params=[(2048, 1 << 23), (4, 4 * 160), (3, 3 * 16)], ids=["whole", "wide", "narrow"])
def blocks(request, monkeypatch):
    """Rows and elements of a block: all of it; four rows by 160 features, in groups; three rows by 16 features."""
    monkeypatch.setattr(_torch, "BLOCK_ROWS", request.param[0])
    monkeypatch.setattr(_torch, "BLOCK_ELEMENTS", request.param[1])


def leaves(kind: str) -> dict[str, torch.Tensor]:
    coder = draw_coder(F, D, kind=kind, dtype=torch.float64, seed=1)
    tensors = {"x": draw(kind, N, D, dtype=torch.float64), "W_enc": coder["W_enc"], "b_enc": coder["b_enc"]}
    tensors["theta"] = draw("normal", F, dtype=torch.float64, seed=3, scale=0.1) + (
        3.0 if kind == "ties" else 0.8
    )
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def encoded(impl: str, mode: str, kind: str):
    tensors = leaves(kind)
    x, W_enc, b_enc, theta = tensors.values()
    options = {
        "topk": {"k": K},
        "signed": {"k": K, "relu": False},
        "batch": {"k": K, "scope": "batch"},
        "threshold": {"threshold": theta},
        "window": {"threshold": theta, "bandwidth": 0.3},
    }[mode]
    acts = ops.encode(x, W_enc, b_enc, impl=impl, **options)
    upstream = torch.linspace(-1, 1, acts.values.numel(), dtype=torch.float64).reshape(acts.values.shape)
    loss = (acts.values * upstream).sum() + (acts.l0().sum() if mode == "window" else 0.0)
    grads = torch.autograd.grad(loss, tuple(tensors.values()), allow_unused=True)
    return acts, dict(zip(tensors, grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["topk", "signed", "batch", "threshold", "window"])
@pytest.mark.usefixtures("blocks")
def test_blocks_change_nothing(mode, kind):
    got, got_grads = encoded("torch", mode, kind)
    want, want_grads = encoded("reference", mode, kind)
    assert torch.equal(got.indices, want.indices)
    assert (got.row_ptr is None) == (want.row_ptr is None)
    assert got.row_ptr is None or torch.equal(got.row_ptr, want.row_ptr)
    assert_within_budget(got.values.detach(), want.values.detach(), want.values.detach(), name="values")
    for name, gradient in want_grads.items():
        assert (got_grads[name] is None) == (gradient is None), name
        if gradient is not None:
            magnitude = max(float(gradient.abs().max()), 64.0)
            assert_within_budget(got_grads[name], gradient, gradient, magnitude=magnitude, name=name)


def test_groups_are_used_and_ties_between_groups_are_seen(monkeypatch):
    """Equal values in more groups than are chosen: the lowest indices win, wherever ``torch.topk`` would look."""
    redone = []
    redo = _torch._redo
    monkeypatch.setattr(
        _torch, "_redo", lambda z, i, unsure: redone.append(int(unsure.sum())) or redo(z, i, unsure)
    )
    z = torch.zeros(2, 640)
    z[0, ::16] = 1.0  # one in every group
    z[1, [5, 300, 639]] = torch.tensor([3.0, 2.0, 1.0])
    assert _torch.select_topk(z, 3).tolist() == [[0, 16, 32], [5, 300, 639]]
    assert redone == [0, 1]  # no doubt among the candidates; the first row had equals outside of them


def test_the_scratch_is_bounded():
    x, W_enc = torch.ones(2048, 1), torch.ones(20000, 1)
    blocks = _torch._Blocks(x, W_enc, torch.zeros(20000))
    assert blocks.scratch.numel() <= _torch.BLOCK_ELEMENTS
    assert sum(z.shape[1] for _, z in blocks) == 20000
