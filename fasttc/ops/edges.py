"""Edges: direct effects of active features on the targets whose gradients reached their outputs."""

from torch import Tensor

from fasttc.ops import _torch, reference
from fasttc.ops._dispatch import choose
from fasttc.ops._validate import check_matrix, check_same_device, check_vector


def edges(
    G: Tensor,
    W_dec: Tensor,
    features: Tensor,
    positions: Tensor,
    activations: Tensor,
    *,
    target_positions: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``E[b, j] = activations_j · <G[b, positions_j], W_dec[features_j]>``, decoder rows read in place.

    Args:
        G: [B, T, D], gradient of each target with respect to one layer's output.
        W_dec: [F, D].
        features: [n] integers below F.
        positions: [n] integers below T, ascending.
        activations: [n].
        target_positions: [B] position of each target, or None. Where given, G[b, t] is known to be zero for
            ``t > target_positions[b]`` and those products are skipped (their edges are exactly 0).
        impl: "auto", "reference", "torch" or "triton". A named one runs or raises.

    Returns:
        [B, n] float32 (float64 for float64 G). Deterministic. Not differentiable.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, with what was expected and what came.
    """
    if not isinstance(G, Tensor) or G.dim() != 3:
        raise ValueError(f"G: expected a tensor [B, T, D], got {getattr(G, 'shape', type(G).__name__)}")
    check_matrix("W_dec", W_dec)
    if W_dec.shape[1] != G.shape[2]:
        raise ValueError(
            f"W_dec: expected [F, {G.shape[2]}] to match G {list(G.shape)}, got {list(W_dec.shape)}"
        )
    for name, tensor in (("features", features), ("positions", positions), ("activations", activations)):
        check_vector(name, tensor, features.shape[0])
    for name, tensor, below in (("features", features, W_dec.shape[0]), ("positions", positions, G.shape[1])):
        if tensor.is_floating_point():
            raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
        if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < below:
            raise ValueError(
                f"{name}: expected values in [0, {below}), got {int(tensor.min())}..{int(tensor.max())}"
            )
    if target_positions is not None:
        check_vector("target_positions", target_positions, G.shape[0])
    check_same_device(G=G, W_dec=W_dec, features=features, positions=positions, activations=activations)
    choice = choose(impl, "edges", G)
    if choice.impl == "reference":
        return reference.edges(G, W_dec, features, positions, activations)
    return _torch.edges(G, W_dec, features, positions, activations, target_positions)
