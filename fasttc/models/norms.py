"""Norms without their gain, and norms whose scale is held."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fasttc.models._patch import patched_forward
from fasttc.models.anatomy import norm_eps
from fasttc.models.precision import is_exact

_HELD: WeakKeyDictionary[nn.Module, "_HeldScale"] = WeakKeyDictionary()


def normalized(norm: nn.Module, resid: Tensor) -> Tensor:
    """``norm(resid)`` without gain and bias, as the model computes it: TransformerLens' ``hook_normalized``.

    RMS norms: ``resid * rsqrt(mean(resid²) + eps)`` in float32 (in float64 inside :func:`float64_exact`).
    LayerNorm: ``(resid - mean) * rsqrt(var + eps)``. Inside :func:`fasttc.models.held`, at the scale that is held.

    Args:
        norm: a norm module of the model.
        resid: its input, ``[..., D]``.

    Returns:
        ``[..., D]`` in the dtype of ``resid``, differentiable.
    """
    held = _HELD.get(norm)
    if held is None or held.is_original():
        return _normalized(norm, resid)
    return _normalized(norm, held.before) + held.moved(resid).to(resid.dtype)


def _normalized(norm: nn.Module, resid: Tensor) -> Tensor:
    eps = norm_eps(norm)
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(resid, norm.normalized_shape, eps=eps)
    wide = resid.to(torch.float64 if is_exact(norm) else torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(resid.dtype)


class _HeldScale:
    """What is kept of a norm's original pass: its input and its output."""

    def __init__(self, norm: nn.Module, is_original: Callable[[], bool]) -> None:
        self.norm, self.is_original = norm, is_original
        self.before, self.output = torch.empty(0), torch.empty(0)

    def moved(self, resid: Tensor) -> Tensor:
        """``[..., D]``, at least float32: what the change of the input adds, at the original scale, without gain."""
        wide = torch.promote_types(resid.dtype, torch.float32)
        change, before = resid.to(wide) - self.before.to(wide), self.before.to(wide)
        if isinstance(self.norm, nn.LayerNorm):
            change, before = (tensor - tensor.mean(-1, keepdim=True) for tensor in (change, before))
        return change * torch.rsqrt(before.pow(2).mean(-1, keepdim=True) + norm_eps(self.norm))


@contextmanager
def scale_held(norm: nn.Module, gain_offset: float, is_original: Callable[[], bool]) -> Iterator[None]:
    """Inside, ``norm`` keeps the scale of its last original pass: then its output is linear in its input.

    The output is the original one plus what the change of the input adds: its very bits where nothing has changed.

    Args:
        norm: a norm module.
        gain_offset: added to its weight to give its gain.
        is_original: whether the pass that is running is an original one.
    """
    true_forward, held = norm.forward, _HeldScale(norm, is_original)

    def forward(resid: Tensor) -> Tensor:
        if is_original():
            held.before, held.output = resid, true_forward(resid)
            return held.output
        weight: Any = norm.weight
        moved = held.moved(resid)
        return held.output + (moved * (weight.to(moved.dtype) + gain_offset)).to(held.output.dtype)

    _HELD[norm] = held
    try:
        with patched_forward(norm, forward):
            yield
    finally:
        del _HELD[norm]
