"""Triton encode as ``torch.library`` ops with gradients: TopK, BatchTopK and JumpReLU.

With ``z = x W_enc^T + b_enc`` and the entries ``(n, f)`` that were selected::

    TopK, BatchTopK   value = relu(z) or z               dz = dvalue · 1[value > 0] or dvalue
    JumpReLU          value = z·H, gate = H, H = 1[z > θ]     dz = dvalue · H
                      dθ_f = -(1/ε) sum over the window |z - θ| < ε/2 of (θ_f dvalue + dgate)
                      (rectangle kernel: Rajamanoharan et al. 2024, eq. 11-12)

    dW_enc[f] = sum_n dz_nf x_n,   db_enc[f] = sum_n dz_nf,   dx_n = sum_f dz_nf W_enc[f]

The backward touches the selected entries only: one stable sort by feature and one pass of sums, or, where the
dispatcher says so, a dense product. Nothing saved is written to: a graph can be walked any number of times. Bitwise
equal from run to run.

Memory: pre-activations live in a scratch of at most FASTTC_SCRATCH_MB mebibytes (1024 by default; at least 128 rows).
With 0, TopK goes without, by certificates (:mod:`fasttc.kernels.certificate`). Results are exact either way.
"""

import os

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd, register_fake

from fasttc.ops import _dense
from fasttc.ops._dispatch import Choice, choose
from fasttc.ops._triton import decode_rows, segment_encoder
from fasttc.ops.acts import SparseActs


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    k: int | None,
    theta: Tensor | None,
    scope: str,
    relu: bool,
    bandwidth: float | None,
    choice: Choice,
) -> SparseActs:
    """See :func:`fasttc.ops.encode`; ``x [N, D]`` is already flat and every argument checked."""
    shape, n_features = (x.shape[0],), W_enc.shape[0]
    if theta is not None:
        values, indices, row_ptr, gates, _ = encode_threshold(x, W_enc, b_enc, theta, bandwidth, choice.gemm)
        return SparseActs(values, indices, n_features, shape, row_ptr, None if bandwidth is None else gates)
    assert k is not None, "the public function passes k or theta"
    dense = _dense_backward(x, n_features, k)
    if scope == "batch":
        values, indices, row_ptr = encode_batch_topk(x, W_enc, b_enc, k, relu, choice.gemm, dense)
        return SparseActs(values, indices, n_features, shape, row_ptr)
    values, indices = encode_topk(x, W_enc, b_enc, k, relu, choice.gemm, dense)
    return SparseActs(values, indices, n_features, shape)


def scratch_bytes() -> int:
    """Bound of the scratch, from FASTTC_SCRATCH_MB."""
    text = os.environ.get("FASTTC_SCRATCH_MB", "1024")
    if not text.isdecimal():
        raise ValueError(f"FASTTC_SCRATCH_MB: expected a whole number of mebibytes, got {text!r}")
    return int(text) * 2**20


def _dense_backward(x: Tensor, n_features: int, k: int) -> bool:
    if not x.is_cuda:
        return False
    return choose("triton", "encode_backward", x, n_features=n_features, k=k).algorithm == "dense"


def _encoder_grads(
    dz: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None,
    x: Tensor,
    W_enc: Tensor,
    needs: tuple[bool, ...],
    dense: bool = False,
    thetas: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, W_enc, b_enc [float32], θ per feature [float32]) from those of the pre-activations."""
    n_features = W_enc.shape[0]
    dx = decode_rows(dz, indices, row_ptr, W_enc).to(x.dtype) if needs[0] else None
    if not any(needs[1:]) and thetas is None:
        return dx, None, None, None
    if dense and thetas is None:
        dW, db = _dense.encoder_gradients(dz, indices, row_ptr, x, n_features)
        return dx, dW.to(W_enc.dtype), db, None
    dW, db, dtheta = segment_encoder(dz, indices, row_ptr, x, n_features, thetas, W_enc.dtype)
    return dx, dW, db, dtheta


# --- TopK ------------------------------------------------------------------------------------------------------


@custom_op("fasttc::encode_topk", mutates_args=())
def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, relu: bool, gemm: str, dense_backward: bool = False
) -> tuple[Tensor, Tensor]:
    """values [N, k] float32 and indices [N, k] int32 of the k largest pre-activations, ascending in a row.

    ``gemm``: "tile" or "vendor".
    """
    bound = scratch_bytes()
    if bound == 0:
        from fasttc.kernels.certificate import launch_encode_topk_certified

        return launch_encode_topk_certified(x, W_enc, b_enc, k, relu=relu, gemm=gemm)
    from fasttc.kernels.encode import launch_encode_topk

    return launch_encode_topk(x, W_enc, b_enc, k, relu=relu, gemm=gemm, scratch_bytes=bound)


@register_fake("fasttc::encode_topk")
def _(x, W_enc, b_enc, k, relu, gemm, dense_backward=False):
    n = x.shape[0]
    return x.new_empty(n, k, dtype=torch.float32), x.new_empty(n, k, dtype=torch.int32)


def _keep_topk(ctx, inputs, output) -> None:
    x, W_enc, b_enc, _, relu, _, dense = inputs
    ctx.save_for_backward(x, W_enc, *output)
    ctx.relu, ctx.dense, ctx.bias_dtype = relu, dense, b_enc.dtype


def _topk_grads(ctx, d_values: Tensor, *_unused) -> tuple[Tensor | None, ...]:
    x, W_enc, values, indices, *row_ptr = ctx.saved_tensors
    dz = d_values * (values > 0) if ctx.relu else d_values
    dx, dW, db, _ = _encoder_grads(
        dz, indices, row_ptr[0] if row_ptr else None, x, W_enc, ctx.needs_input_grad[:3], ctx.dense
    )
    return dx, dW, None if db is None else db.to(ctx.bias_dtype), None, None, None, None


register_autograd("fasttc::encode_topk", _topk_grads, setup_context=_keep_topk)


# --- BatchTopK -------------------------------------------------------------------------------------------------


@custom_op("fasttc::encode_batch_topk", mutates_args=())
def encode_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, relu: bool, gemm: str, dense_backward: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """values [N·k] float32, indices [N·k] int32 and row_ptr [N + 1] int64 of the batch's largest pre-activations."""
    from fasttc.kernels.batch import launch_encode_batch_topk

    rows = launch_encode_batch_topk(x, W_enc, b_enc, k, relu=relu, gemm=gemm, scratch_bytes=scratch_bytes())
    return rows.values, rows.indices, rows.row_ptr


@register_fake("fasttc::encode_batch_topk")
def _(x, W_enc, b_enc, k, relu, gemm, dense_backward=False):
    n = x.shape[0]
    return (
        x.new_empty(n * k, dtype=torch.float32),
        x.new_empty(n * k, dtype=torch.int32),
        x.new_empty(n + 1, dtype=torch.int64),
    )


register_autograd("fasttc::encode_batch_topk", _topk_grads, setup_context=_keep_topk)


# --- JumpReLU --------------------------------------------------------------------------------------------------


@custom_op("fasttc::encode_threshold", mutates_args=())
def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, bandwidth: float | None, gemm: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """values, indices and row_ptr of the entries above θ [F] or [] as CSR; gates (float32) and window (bool) of each.

    Without a bandwidth gates and window are empty. With one, the entries of the window below θ come too, with value
    and gate 0.
    """
    from fasttc.kernels.threshold import ACTIVE, WINDOW, launch_encode_threshold

    rows = launch_encode_threshold(
        x, W_enc, b_enc, theta, bandwidth=bandwidth, gemm=gemm, scratch_bytes=scratch_bytes()
    )
    if rows.flags is None:
        gates, window = rows.values.new_empty(0), rows.values.new_empty(0, dtype=torch.bool)
    else:
        gates, window = (rows.flags & ACTIVE).float(), (rows.flags & WINDOW) > 0
    return rows.values, rows.indices, rows.row_ptr, gates, window


@register_fake("fasttc::encode_threshold")
def _(x, W_enc, b_enc, theta, bandwidth, gemm):
    entries = torch.library.get_ctx().new_dynamic_size()
    flags = 0 if bandwidth is None else entries
    return (
        x.new_empty(entries, dtype=torch.float32),
        x.new_empty(entries, dtype=torch.int32),
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
        x.new_empty(flags, dtype=torch.float32),
        x.new_empty(flags, dtype=torch.bool),
    )


def _keep_threshold(ctx, inputs, output) -> None:
    x, W_enc, b_enc, theta, bandwidth, _ = inputs
    _, indices, row_ptr, gates, window = output
    ctx.save_for_backward(x, W_enc, theta, indices, row_ptr, gates, window)
    ctx.bandwidth, ctx.bias_dtype = bandwidth, b_enc.dtype


def _threshold_grads(ctx, d_values: Tensor, _indices, _row_ptr, d_gates: Tensor, _window):
    x, W_enc, theta, indices, row_ptr, gates, window = ctx.saved_tensors
    thetas, dz = None, d_values
    if ctx.bandwidth is not None:
        dz = d_values * gates
        if ctx.needs_input_grad[3]:
            at = theta.float() if theta.dim() == 0 else theta.float()[indices.long()]
            thetas = -(at * d_values + d_gates) * window / ctx.bandwidth
    dx, dW, db, dtheta = _encoder_grads(
        dz, indices, row_ptr, x, W_enc, ctx.needs_input_grad[:3], thetas=thetas
    )
    if dtheta is not None:
        dtheta = (dtheta.sum() if theta.dim() == 0 else dtheta).to(theta.dtype)
    return dx, dW, None if db is None else db.to(ctx.bias_dtype), dtheta, None, None


register_autograd("fasttc::encode_threshold", _threshold_grads, setup_context=_keep_threshold)
