"""Decode: the weighted sum of decoder rows, ``y_n = sum_j values_nj W_dec[indices_nj] + b_dec``."""

from torch import Tensor

from fasttc.ops import _dense, _torch, _triton, reference
from fasttc.ops._dispatch import Choice, choose
from fasttc.ops._validate import check_last_dim, check_matrix, check_same_device, check_vector
from fasttc.ops.acts import SparseActs


def decode(
    acts: SparseActs,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    init: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Decodes sparse activations into the output space.

    Args:
        acts: activations of N tokens over F features.
        W_dec: [F, D_out], one row per feature.
        b_dec: [D_out], added to every token.
        init: [*acts.shape, D_out], added as well (a skip connection, or a residual).
        impl: "auto", "reference", "torch" or "triton". A named one runs or raises.

    Returns:
        [*acts.shape, D_out] in the dtype of ``acts.values``. Differentiable in the values, W_dec, b_dec and init.
        Bitwise equal from run to run with impl="triton" and, on the CPU, with the others.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, with what was expected and what came.
    """
    init = _check(acts, W_dec, b_dec, init)
    choice = _choose(impl, acts, W_dec, b_dec, init)
    run = {"reference": reference.decode, "torch": _torch.decode, "triton": _kernels(choice)}[choice.impl]
    return run(acts, W_dec, b_dec, init).reshape(*acts.shape, W_dec.shape[1])


def residual(
    acts: SparseActs,
    W_dec: Tensor,
    target: Tensor,
    b_dec: Tensor | None = None,
    *,
    init: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What a decode leaves over of a target, and its squared length per token: a reconstruction loss in one pass.

    Args:
        acts, W_dec, b_dec, init, impl: as in :func:`decode`.
        target: [*acts.shape, D_out].

    Returns:
        ``e = decode - target`` [*acts.shape, D_out] and ``sum_d e^2`` [*acts.shape], both in the dtype of
        ``acts.values``. Differentiable in the values, W_dec, b_dec, init and target; deterministic as :func:`decode`.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, with what was expected and what came.
    """
    shape, d_out = acts.shape, W_dec.shape[1]
    init = _check(acts, W_dec, b_dec, init)
    target = _check_rows("target", target, acts, d_out)
    check_same_device(values=acts.values, target=target)
    choice = _choose(impl, acts, W_dec, b_dec, init, target)
    if choice.impl == "triton" and choice.algorithm == "sparse":
        arguments = (acts.values, acts.indices, acts.row_ptr, W_dec, b_dec, init, target)
        error, squares = _triton.decode_residual(*arguments)
        dtype = acts.values.dtype
        return error.to(dtype).reshape(*shape, d_out), squares.to(dtype).reshape(shape)
    run = {"reference": reference.decode, "torch": _torch.decode, "triton": _kernels(choice)}[choice.impl]
    error = run(acts, W_dec, b_dec, init) - target.to(acts.values.dtype)
    return error.reshape(*shape, d_out), error.square().sum(-1).reshape(shape)


def _check(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None, init: Tensor | None) -> Tensor | None:
    """Raises for what does not fit; returns init [N, D_out]."""
    if not isinstance(acts, SparseActs):
        raise TypeError(f"acts: expected SparseActs, got {type(acts).__name__}")
    check_matrix("W_dec", W_dec, columns="D_out")
    n_features, d_out = W_dec.shape
    if acts.n_features != n_features:
        raise ValueError(f"W_dec: expected {acts.n_features} rows (the features of acts), got {n_features}")
    if b_dec is not None:
        check_vector("b_dec", b_dec, d_out)
    if init is not None:
        init = _check_rows("init", init, acts, d_out)
    check_same_device(values=acts.values, W_dec=W_dec, b_dec=b_dec, init=init)
    return init


def _check_rows(name: str, rows: Tensor, acts: SparseActs, d_out: int) -> Tensor:
    check_last_dim(name, rows, d_out)
    if tuple(rows.shape[:-1]) != acts.shape:
        raise ValueError(f"{name}: expected shape {[*acts.shape, d_out]}, got {list(rows.shape)}")
    return rows.reshape(-1, d_out)


def _choose(impl: str, acts: SparseActs, W_dec: Tensor, *others: Tensor | None) -> Choice:
    """The dispatcher judges by the output's shape in the weights' dtype, or by a tensor that kernels cannot read."""
    rows = W_dec.new_empty(()).expand(acts.n_tokens, W_dec.shape[1])
    k = acts.values.numel() / max(acts.n_tokens, 1)
    decisive = _triton.unreadable(acts.values, *others)
    return choose(impl, "decode", rows if decisive is None else decisive, n_features=acts.n_features, k=k)


def _kernels(choice: Choice):
    """The decode on a GPU: gathered rows, or a dense product where the dispatcher found it faster."""

    def run(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None, init: Tensor | None) -> Tensor:
        arguments = (acts.values, acts.indices, acts.row_ptr)
        if choice.algorithm == "dense":
            out = _dense.decode(*arguments, acts.n_tokens, W_dec, b_dec, init)
        else:
            out = _triton.decode_rows(*arguments, W_dec, b_dec, init)
        return out.to(acts.values.dtype)

    return run
