"""Where the parts of a language model are: module paths of MLPs, norms, attention, embeddings; and its sizes.

The places come from interp-engine (``resolve_arch``), which reads them from the live modules. See
``docs/design/0004-models-and-interp-engine.md`` for what is taken from it and what is not.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fasttc.models.families import Family, family_of


@dataclass(frozen=True)
class LayerAnatomy:
    """Module paths of one layer, for ``model.get_submodule``.

    Attributes:
        block: the whole layer; its input is the residual before the attention.
        mlp, mlp_norm: the MLP, and the norm applied to the residual before it.
        mlp_post_norm: norm of the MLP's output (Gemma), or None.
        attn, attn_norm, attn_post_norm: the same for the attention.
        attn_value: the value projection, or the fused query-key-value projection.
        attn_output: the output projection.
        window: a query sees itself and the ``window - 1`` keys before it; None for all.
    """

    block: str
    mlp: str
    mlp_norm: str
    mlp_post_norm: str | None
    attn: str
    attn_norm: str
    attn_post_norm: str | None
    attn_value: str
    attn_output: str
    window: int | None


@dataclass(frozen=True)
class Anatomy:
    """Parts and sizes of a model. All paths are valid for ``get_submodule`` of the model that was asked about.

    Attributes:
        family: name of the row of :data:`fasttc.models.FAMILIES`.
        n_layers, d_model, n_heads, n_kv_heads, head_dim, vocab_size: L, D, H, key-value heads, Dh, vocabulary.
        max_positions: length of the context.
        parallel: attention and MLP both read the layer's input (GPT-NeoX), so there is no residual between them.
        layers: one entry per layer.
        root: path of the transformers model inside its wrappers ("" if there are none).
        trunk: the model without its language-model head.
        embed: token embedding.
        position_embed: learned position embedding (GPT-2), or None.
        final_norm, lm_head: the last norm and the unembedding.
        embed_scale: what the looked-up embedding rows are multiplied by (Gemma: square root of D; else 1).
        final_softcap, attn_softcap: ``c`` where the model applies ``c tanh(z / c)`` to logits or to attention
            scores, or None.
        norm: "rms" or "layer".
        gain_offset: added to a norm's weight to give its gain.
        norm_eps: epsilon of the norms.
        qkv_layout: how the query, key and value projections are packed: "separate", "contiguous_thirds" (GPT-2)
            or "per_head_interleaved" (GPT-NeoX).
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    parallel: bool
    layers: tuple[LayerAnatomy, ...]
    root: str
    trunk: str
    embed: str
    position_embed: str | None
    final_norm: str
    lm_head: str
    embed_scale: float
    final_softcap: float | None
    attn_softcap: float | None
    norm: Literal["rms", "layer"]
    gain_offset: float
    norm_eps: float
    qkv_layout: str


def unwrap(model: nn.Module) -> tuple[str, nn.Module]:
    """The transformers model inside PEFT, compile or data-parallel wrappers, and its path in ``model``.

    Raises:
        ValueError: there is none.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return path, module
    raise ValueError(f"model: expected a transformers model or a wrapper of one, got {type(model).__name__}")


def anatomy(model: nn.Module) -> Anatomy:
    """Finds the parts of ``model``; changes nothing.

    Args:
        model: a transformers causal language model of a supported family, also inside a PEFT wrapper.

    Raises:
        ValueError: not a transformers model, unknown family, no language-model head.
    """
    from interp_engine.arch import resolve_arch
    from interp_engine.facts import resolve_facts, text_config

    root, inner = unwrap(model)
    config: Any = text_config(inner.config)
    family = family_of(config.model_type)
    try:
        arch = resolve_arch(inner, inner.config)
    except ValueError as error:
        raise ValueError(
            f"model: expected a {family.name} causal language model, got {type(inner).__name__} ({error})"
        ) from error
    facts = resolve_facts(inner.config)
    names = {id(module): name for name, module in model.named_modules()}
    if id(arch.lm_head) not in names:
        raise ValueError(f"model: expected a language-model head, got none in {type(inner).__name__}")
    final_norm: Any = arch.final_norm
    return Anatomy(
        family=family.name,
        n_layers=arch.n_layers,
        d_model=arch.d_model,
        n_heads=arch.n_heads,
        n_kv_heads=arch.n_kv_heads,
        head_dim=arch.head_dim,
        vocab_size=arch.vocab_size,
        max_positions=config.max_position_embeddings,
        parallel=arch.quirks.parallel_attn_mlp,
        layers=tuple(_layer(arch, facts, layer, family, names) for layer in range(arch.n_layers)),
        root=root,
        trunk=names[id(arch.trunk)],
        embed=names[id(arch.embed)],
        position_embed=names[id(getattr(arch.trunk, family.positions))] if family.positions else None,
        final_norm=names[id(final_norm)],
        lm_head=names[id(arch.lm_head)],
        embed_scale=arch.d_model**0.5 if family.scaled_embedding else 1.0,
        final_softcap=arch.quirks.final_logit_softcapping,
        attn_softcap=arch.quirks.attn_logit_softcapping,
        norm=family.norm,
        gain_offset=family.gain_offset,
        norm_eps=norm_eps(final_norm),
        qkv_layout=str(arch.quirks.qkv_layout.value),
    )


def _layer(arch: Any, facts: Any, layer: int, family: Family, names: dict[int, str]) -> LayerAnatomy:
    def path(module: nn.Module | None) -> str | None:
        return None if module is None else names[id(module)]

    block = arch.block(layer)
    fused = arch.fused_qkv_module(layer)
    return LayerAnatomy(
        block=names[id(block)],
        mlp=names[id(arch.mlp_module(layer))],
        mlp_norm=names[id(arch.pre_mlp_norm(layer))],
        mlp_post_norm=path(arch.post_mlp_norm(layer)),
        attn=names[id(arch.attn_module(layer))],
        attn_norm=names[id(getattr(block, family.attn_norm))],
        attn_post_norm=path(arch.post_attn_norm(layer)),
        attn_value=names[id(arch.v_proj(layer) if fused is None else fused)],
        attn_output=names[id(arch.attn_out_proj(layer))],
        window=facts.sliding_window_for_layer(layer),
    )


def norm_eps(norm: nn.Module) -> float:
    """Epsilon of a norm module, under either of transformers' two names."""
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            return float(getattr(norm, name))
    raise ValueError(f"norm: expected a module with an epsilon, got {type(norm).__name__}")
