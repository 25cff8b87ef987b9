"""Edges: direct effects of active features on the targets whose gradients reached their outputs."""

import torch
from torch import Tensor

from fasttc.ops import _torch, _triton, reference
from fasttc.ops._dispatch import choose
from fasttc.ops._validate import check_float, check_matrix, check_same_device, check_vector


@torch.no_grad()
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
        positions: [n] integers below T, in ascending order.
        activations: [n].
        target_positions: [B] position of each target, or None. Where given, G[b, t] is known to be zero for
            ``t > target_positions[b]`` and those products are skipped (their edges are exactly 0).
        impl: "auto", "reference", "torch" or "triton". A named one runs or raises.

    Returns:
        [B, n] float32 (float64 for float64 G). Deterministic. Not differentiable.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, with what was expected and what came; on the CPU
            also indices out of range or order (on a GPU, looking at them would wait for the device).
    """
    _check(G, W_dec, features, positions, activations, target_positions)
    decisive = _triton.unreadable(G, W_dec, activations)
    choice = choose(impl, "edges", G if decisive is None else decisive)
    if choice.impl == "reference":
        return reference.edges(G, W_dec, features, positions, activations)
    if choice.impl == "triton":
        return _triton.edges(G, W_dec, features, positions, activations, target_positions)
    return _torch.edges(G, W_dec, features, positions, activations, target_positions)


def _check(
    G: Tensor,
    W_dec: Tensor,
    features: Tensor,
    positions: Tensor,
    activations: Tensor,
    target_positions: Tensor | None,
) -> None:
    _check_rank("G", G, "[B, T, D]")
    check_float("G", G)
    check_matrix("W_dec", W_dec)
    if W_dec.shape[1] != G.shape[2]:
        raise ValueError(
            f"W_dec: expected [F, {G.shape[2]}] to match G {list(G.shape)}, got {list(W_dec.shape)}"
        )
    _check_rank("features", features, "[n]")
    _check_indices("features", features, features.shape[0], W_dec.shape[0])
    _check_indices("positions", positions, features.shape[0], G.shape[1])
    if not positions.is_cuda and bool((positions.diff() < 0).any()):
        raise ValueError(f"positions: expected ascending values, got {positions.tolist()[:20]}")
    check_vector("activations", activations, features.shape[0])
    if target_positions is not None:
        _check_indices("target_positions", target_positions, G.shape[0], G.shape[1])
    check_same_device(
        G=G,
        W_dec=W_dec,
        features=features,
        positions=positions,
        activations=activations,
        target_positions=target_positions,
    )


def _check_rank(name: str, tensor: Tensor, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(tensor).__name__}")
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")


def _check_indices(name: str, tensor: Tensor, size: int, below: int) -> None:
    check_vector(name, tensor, size)
    if tensor.is_floating_point():
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    if tensor.is_cuda or tensor.numel() == 0:
        return
    if not 0 <= int(tensor.min()) <= int(tensor.max()) < below:
        raise ValueError(
            f"{name}: expected values in [0, {below}), got {int(tensor.min())}..{int(tensor.max())}"
        )
