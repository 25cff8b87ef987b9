"""The supported model families, as data: only what interp-engine's points and facts do not say."""

from dataclasses import dataclass
from typing import Literal

from fasttc.nn.site import ReadKind, WriteKind


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: the project's name of the family.
        model_types: transformers' ``config.model_type`` of its text models.
        norm: "rms" (scale only) or "layer" (mean subtracted, gain and bias).
        gain_offset: what is added to a norm's weight to give its gain: Gemma stores the gain minus one.
        attn_norm: attribute, on a layer, of the norm before the attention.
        x, y: where the public transcoders of the family read and write (see :class:`fasttc.nn.Site`).
        scaled_embedding: whether the embedding is multiplied by the square root of the width.
        positions: attribute, beside the embedding, of a learned position embedding; "" if the family has none.
    """

    name: str
    model_types: tuple[str, ...]
    norm: Literal["rms", "layer"] = "rms"
    gain_offset: float = 0.0
    attn_norm: str = "input_layernorm"
    x: ReadKind = "mlp_in"
    y: WriteKind = "mlp_out"
    scaled_embedding: bool = False
    positions: str = ""


_ROWS = (
    Family("llama", ("llama",)),
    Family("qwen2", ("qwen2",)),
    Family("qwen3", ("qwen3",)),
    Family("mistral", ("mistral",)),
    # Gemma Scope reads the normalised residual before the gain and writes what is added to the residual.
    Family("gemma2", ("gemma2",), gain_offset=1.0, x="normalized", y="mlp_out_post", scaled_embedding=True),
    # Gemma Scope 2 reads the MLP's input, gain included.
    Family("gemma3", ("gemma3_text", "gemma3"), gain_offset=1.0, y="mlp_out_post", scaled_embedding=True),
    Family("gpt2", ("gpt2",), norm="layer", attn_norm="ln_1", positions="wpe"),
    Family("gpt_neox", ("gpt_neox",), norm="layer"),
)
FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}
_BY_MODEL_TYPE = {model_type: row for row in _ROWS for model_type in row.model_types}


def family_of(model_type: str) -> Family:
    """Row for transformers' ``config.model_type``; ValueError naming all families for an unknown one."""
    if model_type not in _BY_MODEL_TYPE:
        raise ValueError(
            f"model family: expected one of {', '.join(FAMILIES)}, got model type {model_type!r}"
        )
    return _BY_MODEL_TYPE[model_type]
