"""The PyTorch implementations: no dense [N, F] outlives the selection, gathers and segment sums elsewhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttc.ops import reference
from fasttc.ops.acts import SparseActs
from fasttc.ops.reference import compute_dtype


def select_topk(z: Tensor, k: int) -> Tensor:
    """Indices [N, k] (int64, ascending) of the k largest by (value, lower index): exact, ties included.

    ``torch.topk`` breaks ties as it likes, so rows whose k-th value also occurs outside the selection are redone
    with a stable sort.
    """
    top = torch.topk(z, k, dim=-1, sorted=False)
    floor = top.values.min(dim=-1, keepdim=True).values
    unsure = ((z == floor).sum(-1) > (top.values == floor).sum(-1)).nonzero()[:, 0]
    indices = top.indices
    if unsure.numel():
        indices[unsure] = torch.sort(z[unsure], dim=-1, descending=True, stable=True).indices[:, :k]
    return indices.sort(dim=-1).values


class _TopKEncode(torch.autograd.Function):
    """TopK with a backward that touches only the selected entries: the [N, F] pre-activations are not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, relu: bool):  # type: ignore[override]
        z = reference.pre_activations(x, W_enc, b_enc)
        indices = select_topk(z, k)
        values = z.gather(-1, indices)
        values = values.relu() if relu else values
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.relu = relu
        ctx.bias_dtype = b_enc.dtype
        indices = indices.int()
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad_values: Tensor, _grad_indices):  # type: ignore[override]
        x, W_enc, values, indices = ctx.saved_tensors
        dz = grad_values * (values > 0) if ctx.relu else grad_values
        needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
        dx = decode_rows(dz, indices, W_enc).to(x.dtype) if needs_x else None
        dW = segment_sum(dz, indices, x, W_enc.shape[0]).to(W_enc.dtype) if needs_W else None
        db = None
        if needs_b:
            db = (
                dz.new_zeros(W_enc.shape[0])
                .index_add_(0, indices.reshape(-1), dz.reshape(-1))
                .to(ctx.bias_dtype)
            )
        return dx, dW, db, None, None


def decode_rows(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """``sum_k values[n, k] rows[indices[n, k]]``: [N, D]."""
    rows = rows.to(values.dtype)
    return F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


def segment_sum(values: Tensor, indices: Tensor, rows: Tensor, n_features: int) -> Tensor:
    """``out[f] = sum over (n, k) with indices[n, k] = f of values[n, k] rows[n]``: [F, D], fixed order of sums."""
    n, k = indices.shape
    order = indices.reshape(-1).argsort(stable=True)
    token = torch.arange(n, device=indices.device).repeat_interleave(k)[order]
    counts = torch.bincount(indices.reshape(-1), minlength=n_features)
    offsets = counts.cumsum(0) - counts
    return F.embedding_bag(
        token, rows.to(values.dtype), offsets, per_sample_weights=values.reshape(-1)[order], mode="sum"
    )


def encode(x, W_enc, b_enc, *, k, theta, scope, relu, bandwidth) -> SparseActs:
    """See :func:`fasttc.ops.encode`; ``x [N, D]`` is already flat and every argument checked."""
    if theta is None and scope == "token" and x.shape[0] > 0:
        values, indices = _TopKEncode.apply(x, W_enc, b_enc, k, relu)  # type: ignore[misc]
        return SparseActs(values, indices, W_enc.shape[0], (x.shape[0],))
    return reference.encode(x, W_enc, b_enc, k=k, theta=theta, scope=scope, relu=relu, bandwidth=bandwidth)


def decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None, init: Tensor | None) -> Tensor:
    """``sum_j values_j W_dec[indices_j] (+ b_dec) (+ init)``: [N, D_out] in the dtype of the values."""
    dtype = acts.values.dtype
    rows = W_dec.to(dtype)
    if acts.values.numel() == 0:
        out = rows.new_zeros(acts.n_tokens, rows.shape[1]) + 0 * rows.sum()
    elif acts.row_ptr is None:
        out = F.embedding_bag(acts.indices.long(), rows, per_sample_weights=acts.values, mode="sum")
    else:
        out = F.embedding_bag(
            acts.indices.long(), rows, acts.row_ptr[:-1], per_sample_weights=acts.values, mode="sum"
        )
    if b_dec is not None:
        out = out + b_dec.to(dtype)
    return out if init is None else out + init.to(dtype)


def edges(
    G: Tensor,
    W_dec: Tensor,
    features: Tensor,
    positions: Tensor,
    activations: Tensor,
    target_positions: Tensor | None,
) -> Tensor:
    """Token-grouped GEMMs: the decoder rows of one token at a time, never [B, n, D]."""
    dtype = compute_dtype(G)
    out = torch.zeros(G.shape[0], features.shape[0], dtype=dtype, device=G.device)
    present, counts = torch.unique_consecutive(positions, return_counts=True)
    start = 0
    for position, count in zip(present.tolist(), counts.tolist(), strict=True):
        stop = start + count
        rows = W_dec[features[start:stop].long()].to(dtype) * activations[start:stop, None].to(dtype)
        if target_positions is None:
            torch.matmul(G[:, position].to(dtype), rows.T, out=out[:, start:stop])
        else:
            reached = (target_positions >= position).nonzero()[:, 0]
            out[reached, start:stop] = G[reached, position].to(dtype) @ rows.T
        start = stop
    return out
