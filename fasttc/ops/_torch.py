"""The PyTorch implementations: pre-activations are made, searched and forgotten block by block, so no [N, F] exists.

What measuring on a CPU decided: a GEMM wants thousands of rows (the library packs W_enc anew on every call), so blocks
are tall and cut through the features; maxima of groups leave ``torch.topk`` a small part of a row to look at; a
segment sum over sorted entries (``embedding_bag``) costs a tenth of that op's own gradient for its table; the sort
itself costs next to nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttc.ops import reference
from fasttc.ops.acts import SparseActs
from fasttc.ops.reference import compute_dtype

BLOCK_ROWS = 2048
BLOCK_ELEMENTS = 1 << 23  # pre-activations held at a time: 32 MiB in float32
SELECT_ROWS = 512  # searched at a time: what a selection needs besides the block stays small
GROUP = 16  # columns whose maximum stands for them in the first round of a selection


# --- selection -------------------------------------------------------------------------------------------------


def select_topk(z: Tensor, k: int) -> Tensor:
    """Indices [N, k] (int64, ascending) of the k largest by (value, lower index): exact, ties included.

    Two rounds: the k groups with the largest maxima hold k elements as large as the smallest of these maxima, so what
    is outside of them can at most equal the k-th value. Rows where something does are redone with a stable sort,
    because ``torch.topk`` breaks ties as it likes.
    """
    n, width = z.shape
    groups = width // GROUP
    if width % GROUP or 4 * k > groups:
        return _by_value(z, k)[0]
    maxima = z.view(n, groups, GROUP).amax(-1)
    chosen = maxima.topk(k, sorted=False).indices.sort().values
    columns = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=z.device)).view(n, k * GROUP)
    places, floor = _by_value(z.gather(1, columns), k)
    indices = columns.gather(1, places)
    outside = (maxima >= floor).sum(1) > (maxima.gather(1, chosen) >= floor).sum(1)
    return _redo(z, indices, outside)


def _by_value(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same in one round, and the k-th value of each row [N, 1]."""
    top = torch.topk(z, k, dim=-1, sorted=False)
    floor = top.values.amin(-1, keepdim=True)
    unsure = (z == floor).sum(-1) > (top.values == floor).sum(-1)
    return _redo(z, top.indices.sort(-1).values, unsure), floor


def _redo(z: Tensor, indices: Tensor, unsure: Tensor) -> Tensor:
    rows = unsure.nonzero()[:, 0]
    if rows.numel():
        order = torch.sort(z[rows], dim=-1, descending=True, stable=True).indices
        indices[rows] = order[:, : indices.shape[1]].sort(-1).values
    return indices


class _Blocks:
    """The pre-activations ``x W_enc^T + b_enc`` of some rows, one range of features at a time, in one scratch."""

    def __init__(self, x: Tensor, W_enc: Tensor, b_enc: Tensor):
        self.x, self.W_enc, self.b_enc = x.to(compute_dtype(x)), W_enc, b_enc
        features = W_enc.shape[0]
        width = max(BLOCK_ELEMENTS // max(len(x), 1), GROUP) // GROUP * GROUP
        self.starts = range(0, features, width)
        self.scratch = self.x.new_empty(len(x) * min(width, features))

    def __iter__(self):
        """Yields (first feature, z [rows, width]); z is overwritten by the next block."""
        dtype, features = self.x.dtype, self.W_enc.shape[0]
        for start in self.starts:
            stop = min(start + self.starts.step, features)
            z = self.scratch[: len(self.x) * (stop - start)].view(len(self.x), stop - start)
            W, b = self.W_enc[start:stop].to(dtype), self.b_enc[start:stop].to(dtype)
            yield start, torch.addmm(b, self.x, W.T, out=z)


def _topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices [N, k] of the largest pre-activations of each row."""
    found = []
    for rows in x.split(BLOCK_ROWS):
        values, indices = [], []
        for start, z in _Blocks(rows, W_enc, b_enc):
            best = torch.cat([select_topk(part, min(k, z.shape[1])) for part in z.split(SELECT_ROWS)])
            values.append(z.gather(1, best))
            indices.append(best + start)
        value, index = torch.cat(values, 1), torch.cat(indices, 1)
        if len(values) > 1:
            places = _by_value(value, k)[0]
            value, index = value.gather(1, places), index.gather(1, places)
        found.append((value, index))
    return torch.cat([value for value, _ in found]), torch.cat([index for _, index in found])


def _above(x: Tensor, W_enc: Tensor, b_enc: Tensor, lowest: Tensor) -> tuple[Tensor, Tensor]:
    """Values and places (``token · F + feature``, ascending) of the pre-activations above ``lowest [F]``."""
    found, n_features = [], W_enc.shape[0]
    for first in range(0, len(x), BLOCK_ROWS):
        for start, z in _Blocks(x[first : first + BLOCK_ROWS], W_enc, b_enc):
            token, feature = (z > lowest[start : start + z.shape[1]]).nonzero(as_tuple=True)
            found.append((z[token, feature], (token + first) * n_features + feature + start))
    return _joined(found)


def _batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and places (ascending) of the ``N·k`` largest by (value, lower place) of all pre-activations."""
    wanted, n_features = len(x) * k, W_enc.shape[0]
    best = x.new_empty(0, dtype=compute_dtype(x)), torch.empty(0, dtype=torch.int64, device=x.device)
    for first in range(0, len(x), BLOCK_ROWS):
        for start, z in _Blocks(x[first : first + BLOCK_ROWS], W_enc, b_enc):
            floor = best[0].min() if len(best[0]) == wanted else z.min()
            if z.numel() > wanted:
                floor = torch.maximum(floor, z.reshape(-1).topk(wanted, sorted=False).values.min())
            token, feature = (z >= floor).nonzero(as_tuple=True)
            values, places = _joined(
                [best, (z[token, feature], (token + first) * n_features + feature + start)]
            )
            kept = values.sort(descending=True, stable=True).indices[:wanted].sort().values
            best = values[kept], places[kept]
    return best


def _joined(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    places, order = torch.cat([places for _, places in found]).sort()
    return torch.cat([values for values, _ in found])[order], places


# --- gradients -------------------------------------------------------------------------------------------------


def _bags(values: Tensor, indices: Tensor, row_ptr: Tensor | None, table: Tensor) -> Tensor:
    """``sum_j values_j table[indices_j]`` per row of padded (``row_ptr`` None) or CSR entries, which exist."""
    offsets = None if row_ptr is None else row_ptr[:-1].to(indices.dtype)
    return F.embedding_bag(indices, table, offsets, per_sample_weights=values, mode="sum")


def segment_sum(values: Tensor, indices: Tensor, tokens: Tensor, rows: Tensor, n_features: int) -> Tensor:
    """``out[f] = sum of values_j rows[tokens_j] over indices_j = f``: [F, D] in the dtype of the values.

    Sums run in the order of the entries: bitwise equal from run to run.
    """
    if indices.numel() == 0:
        return values.new_zeros(n_features, rows.shape[1])
    order = indices.reshape(-1).argsort(stable=True)
    counts = torch.bincount(indices.reshape(-1), minlength=n_features)
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    token = tokens.reshape(-1)[order]
    return _bags(values.reshape(-1)[order], token, row_ptr, rows.to(values.dtype))


class _Entries(torch.autograd.Function):
    """Gives selected pre-activations their gradients: those of x, W_enc and b_enc, over these entries alone."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, z, indices, tokens, row_ptr):  # type: ignore[override]
        ctx.save_for_backward(x, W_enc, b_enc, indices, tokens, row_ptr)
        return z.view_as(z)

    @staticmethod
    def backward(ctx, dz: Tensor):  # type: ignore[override]
        x, W_enc, b_enc, indices, tokens, row_ptr = ctx.saved_tensors
        needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
        dx = dW = db = None
        if needs_x:
            empty = dz.numel() == 0
            dx = torch.zeros_like(x) if empty else _bags(dz, indices, row_ptr, W_enc.to(dz.dtype)).to(x.dtype)
        if needs_W:
            dW = segment_sum(dz, indices, tokens, x, W_enc.shape[0]).to(W_enc.dtype)
        if needs_b:
            sums = dz.new_zeros(W_enc.shape[0])
            db = sums.index_add_(0, indices.reshape(-1), dz.reshape(-1)).to(b_enc.dtype)
        return dx, dW, db, None, None, None, None


class _Credit(torch.autograd.Function):
    """Passes decoded rows on and gives the table its gradient, which ``embedding_bag``'s own is much slower at."""

    @staticmethod
    def forward(ctx, out, table, values, indices, tokens):  # type: ignore[override]
        ctx.save_for_backward(values, indices, tokens)
        ctx.n_features, ctx.dtype = table.shape[0], table.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        values, indices, tokens = ctx.saved_tensors
        dtable = None
        if ctx.needs_input_grad[1]:
            dtable = segment_sum(values, indices, tokens, dy, ctx.n_features).to(ctx.dtype)
        return dy, dtable, None, None, None


# --- ops -------------------------------------------------------------------------------------------------------


def encode(x, W_enc, b_enc, *, k, theta, scope, relu, bandwidth) -> SparseActs:
    """See :func:`fasttc.ops.encode`; ``x [N, D]`` is already flat and every argument checked."""
    n, n_features = len(x), W_enc.shape[0]
    if n == 0:
        return reference.encode(
            x, W_enc, b_enc, k=k, theta=theta, scope=scope, relu=relu, bandwidth=bandwidth
        )
    row_ptr = gates = None
    with torch.no_grad():
        if theta is None and scope == "token":
            z, indices = _topk(x, W_enc, b_enc, k)
            tokens = torch.arange(n, device=x.device)[:, None].expand_as(indices)
        else:
            if theta is None:
                z, places = _batch_topk(x, W_enc, b_enc, k)
            else:
                z, places = _open(x, W_enc, b_enc, theta, bandwidth)
            tokens, indices = places // n_features, places % n_features
            row_ptr = torch.searchsorted(tokens, torch.arange(n + 1, device=x.device))
        z += 0.0  # -0 becomes +0
    values = _Entries.apply(x, W_enc, b_enc, z, indices, tokens, row_ptr)
    if theta is not None and bandwidth is not None:
        step = theta.to(z.dtype).expand(n_features)[indices]
        values, gates = reference.Jump.apply(values, step, bandwidth)  # type: ignore[misc]
    elif theta is None and relu:
        values = values.relu()
    return SparseActs(values, indices.int(), n_features, (n,), row_ptr, gates)


def _open(x, W_enc, b_enc, theta: Tensor, bandwidth: float | None) -> tuple[Tensor, Tensor]:
    """Values and places of the entries of a JumpReLU: above θ, or in the window below it."""
    theta = theta.to(compute_dtype(x)).expand(W_enc.shape[0])
    if bandwidth is None:
        return _above(x, W_enc, b_enc, theta)
    z, places = _above(x, W_enc, b_enc, theta - bandwidth)
    above = theta[places % W_enc.shape[0]]
    kept = (z > above) | ((z - above).abs() < bandwidth / 2)
    return z[kept], places[kept]


def decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None, init: Tensor | None) -> Tensor:
    """``sum_j values_j W_dec[indices_j] (+ b_dec) (+ init)``: [N, D_out] in the dtype of the values."""
    values, dtype = acts.values, acts.values.dtype
    if values.numel() == 0:
        out = values.new_zeros(acts.n_tokens, W_dec.shape[1]) + 0 * W_dec.to(dtype).sum()
    else:
        out = _bags(values, acts.indices, acts.row_ptr, W_dec.detach().to(dtype))
    for term in (b_dec, init):  # in place: [N, D_out] exists once
        out = out if term is None else out.add_(term.to(dtype))
    if values.numel() and W_dec.requires_grad:
        out = _Credit.apply(out, W_dec, values.detach(), acts.indices, acts.tokens)
    return out


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
