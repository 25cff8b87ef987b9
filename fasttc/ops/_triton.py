"""Triton decode, its gradients and the per-feature sums, as ``torch.library`` ops: traceable, differentiable.

Three ops close under differentiation, so a derivative of any order is made of the three again::

    decode_rows   y[n]      = sum_j values[n, j] table[indices[n, j]]        d values: sddmm, d table: segment_rows
    sddmm         out[n, j] = <left[n], table[indices[n, j]]>           d left: decode_rows, d table: segment_rows
    segment_rows  out[f]    = sum of values[n, j] rows[n] where indices[n, j] = f
                                                                         d values: sddmm, d rows: decode_rows

Entries come padded (``values`` and ``indices`` [N, K], ``row_ptr`` None) or as CSR ([entries], ``row_ptr`` [N + 1]).
Everything is summed in float32 in a fixed order: bitwise equal from run to run. Backward passes write to nothing
that they are given, so one graph can be walked any number of times.
"""

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd, register_fake

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def unreadable(*tensors: Tensor | None) -> Tensor | None:
    """The first tensor in a dtype that the kernels do not compute with, or None."""
    return next((t for t in tensors if t is not None and t.dtype not in HALF_AND_SINGLE), None)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with unit stride along its rows, which is what the kernels read."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _n_rows(values: Tensor, row_ptr: Tensor | None) -> int:
    return values.shape[0] if row_ptr is None else row_ptr.shape[0] - 1


# --- decode ----------------------------------------------------------------------------------------------------


@custom_op("fasttc::decode_rows", mutates_args=())
def decode_rows(
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None,
    table: Tensor,
    bias: Tensor | None = None,
    init: Tensor | None = None,
) -> Tensor:
    """``sum_j values[n, j] table[indices[n, j]] (+ bias) (+ init)``: [N, D] float32."""
    from fasttc.kernels.decode import launch_decode

    init = None if init is None else _rows(init)
    bias = None if bias is None else bias.contiguous()
    out, _ = launch_decode(
        values.contiguous(), indices.contiguous(), row_ptr, _rows(table), bias=bias, init=init
    )
    return out


@register_fake("fasttc::decode_rows")
def _(values, indices, row_ptr, table, bias=None, init=None):
    return table.new_empty(_n_rows(values, row_ptr), table.shape[1], dtype=torch.float32)


def _keep_decode(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.dtypes = _input_dtypes(inputs)


def _input_dtypes(inputs) -> list[torch.dtype | None]:
    values, _, _, table, bias, init = inputs[:6]
    return [None if tensor is None else tensor.dtype for tensor in (values, table, bias, init)]


def _decode_grads(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of (values, indices, row_ptr, table, bias, init) from that of the decoded rows."""
    values, indices, row_ptr, table = ctx.saved_tensors[:4]
    of_values, of_table, of_bias, of_init = ctx.dtypes
    # The dispatcher leaves out arguments that equal their default.
    needs = (*ctx.needs_input_grad, False, False)
    d_values = sddmm(dy, table, indices, row_ptr).to(of_values) if needs[0] else None
    d_table = segment_rows(values, indices, row_ptr, dy, table.shape[0], of_table) if needs[3] else None
    d_bias = dy.sum(0).to(of_bias) if needs[4] else None
    d_init = dy.to(of_init) if needs[5] else None
    return d_values, None, None, d_table, d_bias, d_init


register_autograd("fasttc::decode_rows", _decode_grads, setup_context=_keep_decode)


@custom_op("fasttc::decode_residual", mutates_args=())
def decode_residual(
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None,
    table: Tensor,
    bias: Tensor | None,
    init: Tensor | None,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    """``e = decode - target`` [N, D] and the sum of its squares per row [N], both float32, in one pass."""
    from fasttc.kernels.decode import launch_decode

    init = None if init is None else _rows(init)
    bias = None if bias is None else bias.contiguous()
    error, squares = launch_decode(
        values.contiguous(),
        indices.contiguous(),
        row_ptr,
        _rows(table),
        bias=bias,
        init=init,
        target=_rows(target),
    )
    assert squares is not None, "launch_decode returns squares with a target"
    return error, squares


@register_fake("fasttc::decode_residual")
def _(values, indices, row_ptr, table, bias, init, target):
    n = _n_rows(values, row_ptr)
    return table.new_empty(n, table.shape[1], dtype=torch.float32), table.new_empty(n, dtype=torch.float32)


def _keep_residual(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], output[0])
    ctx.dtypes = _input_dtypes(inputs)
    ctx.of_target = inputs[6].dtype


def _residual_grads(ctx, d_error: Tensor, d_squares: Tensor) -> tuple[Tensor | None, ...]:
    dy = d_error + 2 * d_squares[:, None] * ctx.saved_tensors[4]
    return *_decode_grads(ctx, dy), -dy.to(ctx.of_target) if ctx.needs_input_grad[6] else None


register_autograd("fasttc::decode_residual", _residual_grads, setup_context=_keep_residual)


# --- products at the entries -----------------------------------------------------------------------------------


@custom_op("fasttc::sddmm", mutates_args=())
def sddmm(left: Tensor, table: Tensor, indices: Tensor, row_ptr: Tensor | None) -> Tensor:
    """``<left[n], table[indices[n, j]]>``: float32, like ``indices``."""
    from fasttc.kernels.sddmm import launch_sddmm

    return launch_sddmm(_rows(left), _rows(table), indices.contiguous(), row_ptr)


@register_fake("fasttc::sddmm")
def _(left, table, indices, row_ptr):
    return indices.new_empty(indices.shape, dtype=torch.float32)


def _keep_sddmm(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _sddmm_grads(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
    left, table, indices, row_ptr = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_left = decode_rows(d_out, indices, row_ptr, table).to(left.dtype) if needs[0] else None
    d_table = segment_rows(d_out, indices, row_ptr, left, table.shape[0], table.dtype) if needs[1] else None
    return d_left, d_table, None, None


register_autograd("fasttc::sddmm", _sddmm_grads, setup_context=_keep_sddmm)


# --- sums per feature ------------------------------------------------------------------------------------------


@custom_op("fasttc::segment_rows", mutates_args=())
def segment_rows(
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None,
    rows: Tensor,
    n_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``sum over indices[n, j] = f of values[n, j] rows[n]``: [F, D] in ``dtype``, zero for unused features."""
    from fasttc.kernels._features import Terms, sort_entries
    from fasttc.kernels.segment import launch_segment

    order = sort_entries(indices.contiguous(), row_ptr, n_features)
    sums = launch_segment(order, Terms(values=values.contiguous(), left=_rows(rows)), dec_dtype=dtype)
    assert sums.dec is not None, "launch_segment sums what it is given"
    return sums.dec


@register_fake("fasttc::segment_rows")
def _(values, indices, row_ptr, rows, n_features, dtype=torch.float32):
    return rows.new_empty(n_features, rows.shape[1], dtype=dtype)


def _keep_segment(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])


def _segment_grads(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, row_ptr, rows = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_values = sddmm(rows, d_out, indices, row_ptr).to(values.dtype) if needs[0] else None
    d_rows = decode_rows(values, indices, row_ptr, d_out).to(rows.dtype) if needs[3] else None
    return d_values, None, None, d_rows, None, None


register_autograd("fasttc::segment_rows", _segment_grads, setup_context=_keep_segment)


@custom_op("fasttc::segment_encoder", mutates_args=())
def segment_encoder(
    grads: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None,
    x: Tensor,
    n_features: int,
    thetas: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """An encoder's parameter gradients in one pass over the sorted entries.

    Returns dW_enc [F, D] in ``dtype``, ``db[f] = sum grads`` [F] and ``dthreshold[f] = sum thetas`` [F] ([0] without
    ``thetas``), float32.
    """
    from fasttc.kernels._features import Terms, sort_entries
    from fasttc.kernels.segment import launch_segment

    order = sort_entries(indices.contiguous(), row_ptr, n_features)
    terms = Terms(
        grads=grads.contiguous(), right=_rows(x), thetas=None if thetas is None else thetas.contiguous()
    )
    sums = launch_segment(order, terms, enc_dtype=dtype)
    assert sums.enc is not None, "launch_segment sums what it is given"
    assert sums.bias is not None, "and the gradients themselves"
    return sums.enc, sums.bias, sums.bias.new_empty(0) if sums.theta is None else sums.theta


@register_fake("fasttc::segment_encoder")
def _(grads, indices, row_ptr, x, n_features, thetas=None, dtype=torch.float32):
    vector = x.new_empty(n_features, dtype=torch.float32)
    theta = x.new_empty(0 if thetas is None else n_features, dtype=torch.float32)
    return x.new_empty(n_features, x.shape[1], dtype=dtype), vector, theta


# --- edges -----------------------------------------------------------------------------------------------------


@custom_op("fasttc::edges", mutates_args=())
def edges(
    G: Tensor,
    W_dec: Tensor,
    features: Tensor,
    positions: Tensor,
    activations: Tensor,
    target_positions: Tensor | None = None,
) -> Tensor:
    """``activations[j] <G[b, positions[j]], W_dec[features[j]]>``: [B, n] float32. Without a gradient."""
    from fasttc.kernels.edges import launch_edges

    return launch_edges(_rows(G), _rows(W_dec), features, positions, activations, target_positions)


@register_fake("fasttc::edges")
def _(G, W_dec, features, positions, activations, target_positions=None):
    return G.new_empty(G.shape[0], features.shape[0], dtype=torch.float32)
