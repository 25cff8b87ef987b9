"""The oracle: every op in a few lines of differentiable PyTorch, exact in float64, slow and dense on purpose."""

import torch
from torch import Tensor

from fasttc.ops.acts import SparseActs


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32: half precision is stored, never accumulated."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """``z = x W_enc^T + b_enc`` for x [N, D]: [N, F] in the compute dtype. -0 becomes +0."""
    dtype = compute_dtype(x)
    return x.to(dtype) @ W_enc.to(dtype).T + b_enc.to(dtype) + 0.0


def topk(z: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    """The k largest of each row by (value, lower index), as values and int32 indices in ascending index order."""
    order = torch.sort(z.detach(), dim=-1, descending=True, stable=True).indices[:, :k]
    indices = order.sort(dim=-1).values
    values = z.gather(-1, indices)
    return (values.relu() if relu else values), indices.int()


def batch_topk(z: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The N·k largest of the whole batch by (value, lower token, lower index), as CSR values, indices, row_ptr."""
    n, f = z.shape
    order = torch.sort(z.detach().reshape(-1), descending=True, stable=True).indices[: n * k].sort().values
    values = z.reshape(-1)[order]
    row_ptr = torch.searchsorted(order, torch.arange(n + 1, device=z.device) * f)
    return (values.relu() if relu else values), (order % f).int(), row_ptr


class Jump(torch.autograd.Function):
    """``(z·H(z-θ), H(z-θ))`` with the rectangle kernel for θ (JumpReLU SAEs, Rajamanoharan et al. 2024, eq. 11-12).

    d value / dz = H;  d value / dθ = -(θ/ε) rect((z-θ)/ε);  d gate / dθ = -(1/ε) rect((z-θ)/ε).
    """

    @staticmethod
    def forward(ctx, z: Tensor, theta: Tensor, bandwidth: float):  # type: ignore[override]
        on = (z > theta).to(z.dtype)
        ctx.save_for_backward(z, theta, on)
        ctx.bandwidth = bandwidth
        return z * on, on.clone()

    @staticmethod
    def backward(ctx, grad_value: Tensor, grad_gate: Tensor):  # type: ignore[override]
        z, theta, on = ctx.saved_tensors
        window = ((z - theta).abs() < ctx.bandwidth / 2).to(z.dtype)
        grad_theta = -(theta * grad_value + grad_gate) * window / ctx.bandwidth
        return grad_value * on, grad_theta, None


def threshold(
    z: Tensor, theta: Tensor, bandwidth: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """JumpReLU ``z·1[z > θ]`` as CSR values, indices, row_ptr and gates (only with a bandwidth).

    With a bandwidth the entries with ``|z - θ| < ε/2`` below the threshold are kept, with value zero, because
    they carry a gradient for θ.
    """
    theta = theta.to(z.dtype).expand(z.shape[1])
    kept = z.detach() > theta.detach()
    if bandwidth is not None:
        kept |= (z.detach() - theta.detach()).abs() < bandwidth / 2
    token, feature = kept.nonzero(as_tuple=True)
    row_ptr = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    entries = z[token, feature]
    if bandwidth is None:
        return entries, feature.int(), row_ptr, None
    values, gates = Jump.apply(entries, theta[feature], bandwidth)  # type: ignore[misc]
    return values, feature.int(), row_ptr, gates


def encode(x, W_enc, b_enc, *, k, theta, scope, relu, bandwidth) -> SparseActs:
    """See :func:`fasttc.ops.encode`; ``x [N, D]`` is already flat and every argument checked."""
    z = pre_activations(x, W_enc, b_enc)
    shape, n_features = (x.shape[0],), W_enc.shape[0]
    if theta is not None:
        values, indices, row_ptr, gates = threshold(z, theta, bandwidth)
        return SparseActs(values, indices, n_features, shape, row_ptr, gates)
    if scope == "batch":
        values, indices, row_ptr = batch_topk(z, k, relu)
        return SparseActs(values, indices, n_features, shape, row_ptr)
    values, indices = topk(z, k, relu)
    return SparseActs(values, indices, n_features, shape)


def decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None, init: Tensor | None) -> Tensor:
    """``sum_j values_j W_dec[indices_j] (+ b_dec) (+ init)``: [N, D_out] in the dtype of the values."""
    dtype = acts.values.dtype
    flat = SparseActs(acts.values, acts.indices, acts.n_features, (acts.n_tokens,), acts.row_ptr)
    out = flat.to_dense() @ W_dec.to(dtype)
    if b_dec is not None:
        out = out + b_dec.to(dtype)
    return out if init is None else out + init.to(dtype)


def edges(G: Tensor, W_dec: Tensor, features: Tensor, positions: Tensor, activations: Tensor) -> Tensor:
    """``E[b, j] = activations_j <G[b, positions_j], W_dec[features_j]>``: [B, n] in the compute dtype of G."""
    dtype = compute_dtype(G)
    rows = W_dec[features.long()].to(dtype) * activations.to(dtype)[:, None]
    return torch.einsum("bnd,nd->bn", G[:, positions.long()].to(dtype), rows)
