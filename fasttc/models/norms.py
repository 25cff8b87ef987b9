"""Norms without their gain."""

import torch
from torch import Tensor, nn

from fasttc.models.anatomy import norm_eps
from fasttc.models.precision import is_exact


def normalized(norm: nn.Module, resid: Tensor) -> Tensor:
    """``norm(resid)`` without gain and bias, as the model computes it: TransformerLens' ``hook_normalized``.

    RMS norms: ``resid * rsqrt(mean(resid²) + eps)`` in float32 (in float64 inside :func:`float64_exact`).
    LayerNorm: ``(resid - mean) * rsqrt(var + eps)``.

    Args:
        norm: a norm module of the model.
        resid: its input, ``[..., D]``.

    Returns:
        ``[..., D]`` in the dtype of ``resid``, differentiable.
    """
    eps = norm_eps(norm)
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(resid, norm.normalized_shape, eps=eps)
    wide = resid.to(torch.float64 if is_exact(norm) else torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(resid.dtype)
