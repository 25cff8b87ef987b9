"""The model, transcoders and prompts that attribution is measured on: random, seeded, and of realistic density.

The size is that of the case ``base`` on which circuit-tracer was measured: a Gemma-2 of 6 layers and width 256,
JumpReLU transcoders of 4,096 features per layer with about 32 active ones per token, decoders fitted to the MLPs (so
that features explain a part of their output and errors the rest).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttc import Site, Transcoder, TranscoderSet
from fasttc.models import capture, load
from fasttc.models.build import build_causal_lm

_FITTING_TOKENS, _FITTING_LENGTH = 2048, 64
_RIDGE = 0.3  # penalty of the decoders, relative to the mean square of a token's activations


@dataclass(frozen=True)
class Shape:
    """Sizes of a case. ``active``: features per token on the fitting text (10 % more on new text)."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 1024
    vocabulary: int = 4096
    features: int = 4096
    active: int = 29
    context: int = 4096


def build_model(shape: Shape, seed: int, device: str = "cpu") -> Any:
    """A Gemma-2 with soft-caps and post-norms, and weights that keep activations of order one."""
    sizes = {
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "sliding_window": shape.context,
        "query_pre_attn_scalar": shape.head_dim,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    words = ["<pad>", "<eos>", "<bos>", *(f"t{number}" for number in range(3, shape.vocabulary))]
    with torch.device(device):
        model, _ = build_causal_lm({"architecture": "gemma2", "config": sizes}, words)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0, 0.1, generator=generator)
            else:
                scale = 1.0 if "embed" in name else 1.5
                parameter.normal_(0, scale * parameter.shape[1] ** -0.5, generator=generator)
    return model


def build_transcoders(model: nn.Module, shape: Shape, seed: int) -> TranscoderSet:
    """JumpReLU transcoders with the wanted number of active features on random text, decoders fitted by ridge."""
    sites = [Site(layer, "normalized", "mlp_out_post", zero_positions=1) for layer in range(shape.layers)]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(
        3, shape.vocabulary, (_FITTING_TOKENS // _FITTING_LENGTH, _FITTING_LENGTH), generator=generator
    )
    with torch.no_grad(), capture(model, sites) as seen:
        model(ids)
    transcoders = [
        _fitted(x.flatten(0, 1), y.flatten(0, 1), shape, generator)
        for x, y in zip(seen.x, seen.y, strict=True)
    ]
    return TranscoderSet(transcoders, sites, {"benchmark": "attribution", "seed": seed})


@torch.no_grad()
def _fitted(x: Tensor, y: Tensor, shape: Shape, generator: torch.Generator) -> Transcoder:
    transcoder = Transcoder(shape.width, shape.features, activation="jumprelu", k=None)
    transcoder.W_enc.normal_(0, shape.width**-0.5, generator=generator)
    pre = x @ transcoder.W_enc.T
    assert transcoder.threshold is not None, "JumpReLU has one"
    quiet = round(len(x) * (1 - shape.active / shape.features))
    transcoder.threshold.copy_(pre.kthvalue(quiet, dim=0).values)
    acts = torch.where(pre > transcoder.threshold, pre, 0)
    transcoder.b_dec.copy_(y.mean(0))
    gram = acts @ acts.T
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    transcoder.W_dec.copy_(acts.T @ torch.linalg.solve(gram, y - transcoder.b_dec))
    return transcoder


def save(folder: Path, shape: Shape, seed: int) -> None:
    """Builds a case and writes it, so that every measuring process starts from the same files."""
    model = build_model(shape, seed)
    model.save_pretrained(folder / "model")
    build_transcoders(model, shape, seed + 1).save_pretrained(folder / "transcoders")


def open_case(folder: Path) -> tuple[Any, TranscoderSet]:
    """Model and transcoders of a saved case, fully read."""
    model, _ = load(folder / "model")
    return model, TranscoderSet.from_pretrained(folder / "transcoders", lazy=False)


def prompt(length: int, vocabulary: int, seed: int) -> Tensor:
    """``[length]`` random token ids behind a beginning-of-sequence token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.tensor([2]), torch.randint(3, vocabulary, (length - 1,), generator=generator)])


def top_k_set(model: Any, features: int, active: int, seed: int, device: str = "cpu") -> TranscoderSet:
    """Random TopK transcoders: the same number of active features per token, whatever the number of features."""
    config, generator = model.config, torch.Generator(device).manual_seed(seed)
    sites = [Site(layer, "normalized", "mlp_out_post") for layer in range(config.num_hidden_layers)]
    transcoders = []
    for _ in sites:
        transcoder = Transcoder(config.hidden_size, features, activation="topk", k=active, device=device)
        with torch.no_grad():
            for weights in (transcoder.W_enc, transcoder.W_dec):
                weights.normal_(0, config.hidden_size**-0.5, generator=generator)
        transcoders.append(transcoder)
    return TranscoderSet(transcoders, sites)
