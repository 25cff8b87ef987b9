"""Segment: sums over the tokens that use a feature, ``out[f] = sum_n acts[n, f] rows[n]``: the transpose of decode."""

import torch
from torch import Tensor

from fasttc.ops import _torch, _triton, reference
from fasttc.ops._dispatch import choose
from fasttc.ops._validate import check_last_dim, check_same_device
from fasttc.ops.acts import SparseActs


def segment(acts: SparseActs, rows: Tensor, *, impl: str = "auto") -> Tensor:
    """Sums the rows of the tokens that use each feature, weighted by its activation.

    With ``rows = dL/dy`` this is the gradient of W_dec; with the gradients of the pre-activations as values and
    ``rows = x`` that of W_enc; with any label of tokens it is the label's sum over what each feature fires on.

    Args:
        acts: activations of N tokens over F features.
        rows: [*acts.shape, D], any float dtype.
        impl: "auto", "reference", "torch" or "triton". A named one runs or raises.

    Returns:
        [F, D] in the dtype of ``acts.values``, zero for features without an entry. Differentiable in the values and
        the rows. Sums run over ascending tokens: bitwise equal from run to run with impl="triton" and, on the CPU,
        with the others.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, with what was expected and what came.
    """
    if not isinstance(acts, SparseActs):
        raise TypeError(f"acts: expected SparseActs, got {type(acts).__name__}")
    if not isinstance(rows, Tensor) or rows.dim() == 0:
        raise TypeError(f"rows: expected a tensor {[*acts.shape, 'D']}, got {type(rows).__name__}")
    check_last_dim("rows", rows, rows.shape[-1])
    if tuple(rows.shape[:-1]) != acts.shape:
        raise ValueError(f"rows: expected shape {[*acts.shape, 'D']}, got {list(rows.shape)}")
    check_same_device(values=acts.values, rows=rows)
    rows = rows.reshape(acts.n_tokens, rows.shape[-1])
    decisive = _triton.unreadable(acts.values, rows)
    choice = choose(impl, "segment", rows if decisive is None else decisive)
    if choice.impl == "triton":
        sums = _triton.segment_rows(acts.values, acts.indices, acts.row_ptr, rows, acts.n_features)
        return sums.to(acts.values.dtype)
    run = reference.decode if choice.impl == "reference" else _torch.decode
    return run(transposed(acts), rows, None, None)


def transposed(acts: SparseActs) -> SparseActs:
    """The same entries with features as rows: CSR over F rows whose indices are tokens, ascending within a feature.

    Differentiable in the values; entries with value zero stay. Sorts once.
    """
    feature, entry = torch.sort(acts.indices.reshape(-1), stable=True)
    bounds = torch.arange(acts.n_features + 1, dtype=feature.dtype, device=feature.device)
    return SparseActs(
        acts.values.reshape(-1)[entry],
        acts.tokens.reshape(-1)[entry].int(),
        acts.n_tokens,
        (acts.n_features,),
        torch.searchsorted(feature, bounds),
    )
