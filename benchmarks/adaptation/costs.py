"""What training a transcoder costs by arithmetic: FLOPs and bytes, for the ledger and for a prediction on paper."""

from dataclasses import dataclass
from typing import Any

from fasttc.models import anatomy


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its transcoders.

    Attributes:
        layers: L; d_in: D; n_features: F; k: K.
        matrices: numbers in the model's weight matrices that a token passes, embedding and head left out.
        context: T, tokens in a row; width: of all query heads together.
    """

    layers: int
    d_in: int
    n_features: int
    k: int
    matrices: int
    context: int
    width: int

    @classmethod
    def of(cls, model: Any, n_features: int, k: int, context: int = 128) -> "Shape":
        parts, config = anatomy(model), model.config
        blocks = [model.get_submodule(layer.block) for layer in parts.layers]
        matrices = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            len(blocks),
            config.hidden_size,
            n_features,
            k,
            matrices,
            context,
            head * config.num_attention_heads,
        )


def forward_flops(shape: Shape) -> int:
    """Of the model without its head, for one token: two for every weight, four for every pair of positions."""
    return 2 * shape.matrices + 2 * shape.layers * shape.context * shape.width


def step_flops(shape: Shape) -> int:
    """Of all transcoders for one token, forward and backward: the encoder is dense forward and sparse backward.

    ``2 D F`` to encode; ``2 K D`` each to decode, for the codes' gradient, and for the two matrices'.
    """
    return shape.layers * (2 * shape.d_in * shape.n_features + 8 * shape.k * shape.d_in)


def adam_flops(shape: Shape) -> int:
    """Of one update of all weights: about twelve for each."""
    return 12 * shape.layers * 2 * shape.d_in * shape.n_features


def gram_flops(shape: Shape) -> int:
    """Of adding one token to the sums of a closed form: ``K (K + 1)`` for pairs, ``2 K D`` for targets."""
    return shape.layers * (
        2 * shape.d_in * shape.n_features + shape.k * (shape.k + 1) + 2 * shape.k * shape.d_in
    )


def solve_flops(shape: Shape, ridges: int = 6) -> int:
    """Of solving for the decoders by Cholesky, once per ridge: ``F^3 / 3 + 2 F^2 D``."""
    f = shape.n_features
    return ridges * shape.layers * (f**3 // 3 + 2 * f * f * shape.d_in)


def training_flops(shape: Shape, tokens: int, update_tokens: int | None, refit: str | None) -> int:
    """Of a whole training or adaptation."""
    model = tokens * forward_flops(shape)
    solves = {"first": 1, "last": 1, "both": 2, "only": 1}.get(refit or "", 0) * solve_flops(shape)
    if refit == "only":
        return model + tokens * gram_flops(shape) + solves
    updates = -(-tokens // (update_tokens or tokens))
    return model + tokens * step_flops(shape) + updates * adam_flops(shape) + solves
