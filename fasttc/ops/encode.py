"""Encode: the active features of each token, ``act(x W_enc^T + b_enc)``, as :class:`SparseActs`."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fasttc.ops import _torch, _triton, _triton_encode, reference
from fasttc.ops._dispatch import choose
from fasttc.ops._validate import check_last_dim, check_matrix, check_same_device, check_vector
from fasttc.ops.acts import SparseActs

TYPICAL_L0 = 64  # active features per token that the cost model assumes where a threshold decides


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    k: int | None = None,
    threshold: Tensor | float | None = None,
    scope: Literal["token", "batch"] = "token",
    relu: bool = True,
    bandwidth: float | None = None,
    impl: str = "auto",
) -> SparseActs:
    """Encodes tokens into sparse feature activations.

    Exactly one of ``k`` and ``threshold`` is given:

    * ``k`` (TopK): the k largest pre-activations ``z`` of each token by (value, lower index), then ReLU unless
      ``relu=False``. ``scope="batch"`` (BatchTopK, Bussmann et al. 2024): the ``N·k`` largest of the batch.
    * ``threshold`` (JumpReLU): ``z`` where ``z > threshold`` (strict), else 0. ``0.0`` is ReLU.

    Args:
        x: [..., D], any float dtype.
        W_enc: [F, D], one row per feature.
        b_enc: [F].
        k: active features per token, 1 ≤ k ≤ F.
        threshold: a number, or [F].
        scope: over what ``k`` is counted.
        relu: whether TopK values pass a ReLU; closed slots keep their index with value 0.
        bandwidth: width ε > 0 of the rectangle kernel through which the threshold learns (Rajamanoharan et al.
            2024); entries of the window below the threshold are then kept with value 0. None: no such gradient.
        impl: "auto", "reference", "torch" or "triton". A named one runs or raises.

    Returns:
        SparseActs with float32 values (float64 for float64 input), indices ascending within a token.
        Differentiable in x, W_enc, b_enc and, with a bandwidth, threshold. Bitwise equal from run to run.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit, with what was expected and what came.
    """
    check_matrix("W_enc", W_enc)
    n_features, d_in = W_enc.shape
    check_last_dim("x", x, d_in)
    check_vector("b_enc", b_enc, n_features)
    _check_options(n_features, k, threshold, scope, bandwidth)
    theta = None
    if threshold is not None:
        theta = torch.as_tensor(threshold, device=x.device)
        theta = theta if theta.is_floating_point() else theta.to(x.dtype)
    check_same_device(x=x, W_enc=W_enc, b_enc=b_enc, threshold=theta)
    decisive = _triton.unreadable(x, W_enc, b_enc)
    choice = choose(
        impl, "encode", x if decisive is None else decisive, n_features=n_features, k=k or TYPICAL_L0
    )
    flat = x.reshape(-1, d_in)
    options = {"k": k, "theta": theta, "scope": scope, "relu": relu, "bandwidth": bandwidth}
    if choice.impl == "triton":
        acts = _triton_encode.encode(flat, W_enc, b_enc, choice=choice, **options)
    else:
        run = reference.encode if choice.impl == "reference" else _torch.encode
        acts = run(flat, W_enc, b_enc, **options)
    return replace(acts, shape=tuple(x.shape[:-1]))


def _check_options(n_features, k, threshold, scope, bandwidth) -> None:
    if (k is None) == (threshold is None):
        raise ValueError(f"expected exactly one of k and threshold, got k={k!r} and threshold={threshold!r}")
    if scope not in ("token", "batch"):
        raise ValueError(f"scope: expected 'token' or 'batch', got {scope!r}")
    if k is not None:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k: expected an int, got {type(k).__name__}")
        if not 1 <= k <= n_features:
            raise ValueError(f"k: expected 1 <= k <= F = {n_features}, got {k}")
        if bandwidth is not None:
            raise ValueError(f"bandwidth: expected None with k (it belongs to threshold), got {bandwidth!r}")
    elif scope == "batch":
        raise ValueError("scope: expected 'token' with threshold (a threshold has no batch), got 'batch'")
    if isinstance(threshold, Tensor) and threshold.dim() > 0:
        check_vector("threshold", threshold, n_features)
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth: expected a number > 0, got {bandwidth!r}")
