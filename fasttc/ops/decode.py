"""Decode: the weighted sum of decoder rows, ``y_n = sum_j values_nj W_dec[indices_nj] + b_dec``."""

from torch import Tensor

from fasttc.ops import _torch, reference
from fasttc.ops._dispatch import choose
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
        [*acts.shape, D_out] in the dtype of ``acts.values``. Differentiable in the values, W_dec, b_dec and init;
        bitwise equal from run to run on the CPU.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, with what was expected and what came.
    """
    if not isinstance(acts, SparseActs):
        raise TypeError(f"acts: expected SparseActs, got {type(acts).__name__}")
    check_matrix("W_dec", W_dec, columns="D_out")
    n_features, d_out = W_dec.shape
    if acts.n_features != n_features:
        raise ValueError(f"W_dec: expected {acts.n_features} rows (the features of acts), got {n_features}")
    if b_dec is not None:
        check_vector("b_dec", b_dec, d_out)
    if init is not None:
        check_last_dim("init", init, d_out)
        if tuple(init.shape[:-1]) != acts.shape:
            raise ValueError(f"init: expected shape {[*acts.shape, d_out]}, got {list(init.shape)}")
        init = init.reshape(-1, d_out)
    check_same_device(values=acts.values, W_dec=W_dec, b_dec=b_dec, init=init)
    choice = choose(impl, "decode", acts.values)
    run = reference.decode if choice.impl == "reference" else _torch.decode
    return run(acts, W_dec, b_dec, init).reshape(*acts.shape, d_out)
