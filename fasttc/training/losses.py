"""What transcoders are trained on. Every loss is free of the scales of x and y, so layers and models compare."""

from dataclasses import replace

import torch
from torch import Tensor

from fasttc import ops
from fasttc.ops import SparseActs
from fasttc.training.distributed import Processes
from fasttc.training.sharded import summed, winners


def variance_sum(y: Tensor) -> Tensor:
    """``sum_t ||y_t - mean_t y||^2`` of y [N, D_out], a scalar; at least the smallest positive number."""
    return (y - y.mean(0)).square().sum().clamp_min(torch.finfo(y.dtype).tiny)


def normalised_mse(prediction: Tensor, y: Tensor, variance: Tensor | None = None) -> Tensor:
    """``sum_t ||prediction_t - y_t||^2 / sum_t ||y_t - mean_t y||^2``: the unexplained share of the batch's variance.

    Args:
        prediction, y: [N, D_out].
        variance: :func:`variance_sum` of y, if it is known already.

    Returns:
        A scalar, 1 for a constant prediction at the mean. Differentiable in the prediction.
    """
    return (prediction - y).square().sum() / (variance_sum(y) if variance is None else variance)


def auxk(
    x: Tensor,
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    k: int,
    group: Processes | None = None,
) -> Tensor:
    """How badly the k strongest dead features of each token explain what the living left over (Gao et al. 2024).

    ``sum_t ||e_t - ehat_t||^2 / sum_t ||e_t||^2``, ``ehat = relu(topk(x W_enc^T + b_enc)) W_dec``, over the dead
    features only: pass their rows.

    Args:
        x: [N, D]; residual: e = y - yhat [N, D_out], treated as a constant.
        W_enc [n, D], b_enc [n], W_dec [n, D_out]: rows of the n dead features; the gradient reaches all three.
        k: at most n are used.
        group: processes that each give the dead among their own features, and all get the same loss; None: this one.

    Returns:
        A scalar, 1 when nothing is explained.
    """
    residual = residual.detach()
    group = group or Processes()
    if len(W_enc):
        acts = ops.encode(x, W_enc, b_enc, k=min(k, len(W_enc)))
        won = winners(acts.values.detach(), k, group)
        guess = ops.decode(replace(acts, values=acts.values * won), W_dec)
    else:  # all dead features are others'
        winners(x.new_empty(len(x), 0), k, group)
        guess = torch.zeros_like(residual)
    norm = residual.square().sum().clamp_min(torch.finfo(residual.dtype).tiny)
    return (residual - summed(guess, group)).square().sum() / norm


def l1(acts: SparseActs, W_dec: Tensor, scale: Tensor) -> Tensor:
    """``mean_t sum_i f_ti ||W_dec_i|| / scale``: what the features write, whatever they share out to the decoder.

    Weighted by decoder norms (Anthropic, April 2024 update), so that it cannot be escaped by shrinking activations
    and growing decoder rows.

    Args:
        acts: activations of N tokens.
        W_dec: [F, D_out]; the gradient reaches it through the norms.
        scale: scalar in units of y, usually its root mean squared distance from the mean.
    """
    norms = W_dec.norm(dim=1)
    return (acts.values * norms[acts.indices.long()]).sum() / (max(acts.n_tokens, 1) * scale)


def l0_distance(l0: Tensor, target: float) -> Tensor:
    """``(l0 / target - 1)^2`` (Rajamanoharan et al. 2024, appendix F). ``l0`` carries the threshold's gradient."""
    return (l0 / target - 1).square()
