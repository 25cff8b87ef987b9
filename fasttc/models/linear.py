"""A model frozen on one prompt: attention patterns, norm scales, and the weights that are linear between them.

With these held constant, the residual stream between two MLPs is one linear map. :func:`freeze` reads everything
that map consists of from a single forward of the Hugging Face model. Norm gains, mean subtraction and grouped heads
are folded into the weights and norm scales into the patterns, so that a layer of every family has the same form:

    residual before the layer's attention r, after it r':
    r'[t] - r[t] = sum_h sum_s pattern[h][t, s] (value[g(h)] r[s]) output[h]        (+ a constant)

docs/design/0005-linear-operator.md derives it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fasttc.models._patch import evaluating
from fasttc.models.anatomy import Anatomy, LayerAnatomy, anatomy, unwrap
from fasttc.models.capture import capture
from fasttc.models.norms import norm_eps
from fasttc.nn.site import Site


@dataclass(frozen=True)
class LayerWeights:
    """Attention weights of a layer, independent of the prompt.

    Attributes:
        value: ``[KV, Dh, D]``: the value projection of each key-value head, times the gain of the norm before the
            attention; for LayerNorm the mean over D is taken out.
        output: ``[H, D, Dh]``: the output projection of each head, transposed, times the gain of a norm after the
            attention.
    """

    value: Tensor
    output: Tensor


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its scale held constant: ``norm(r)[t] = scale[t] (r[t] - mean r[t]) gain + bias``.

    Attributes:
        scale: ``[T]``.
        gain: ``[D]``.
        centred: whether the mean over D is subtracted (LayerNorm).
    """

    scale: Tensor
    gain: Tensor
    centred: bool


@dataclass(frozen=True)
class FrozenLayer:
    """One layer on one prompt.

    Attributes:
        weights: of the attention.
        pattern: ``[H, T, T]``: attention of query t to key s, times the scale of the norm after the attention at t
            and of the norm before it at s. Zero for s > t.
        mlp_norm: norm before the MLP.
        mlp_post_norm: norm after the MLP (Gemma), or None.
    """

    weights: LayerWeights
    pattern: Tensor
    mlp_norm: FrozenNorm
    mlp_post_norm: FrozenNorm | None


@dataclass(frozen=True)
class FrozenModel:
    """A model on one prompt, as constants and linear maps.

    Attributes:
        layers: L of them.
        parallel: the MLP reads the residual before the attention, not after it.
        final_norm: the last norm.
        embedding: ``[T, D]``: what the tokens alone put into the residual (scaled as the model does; position
            embeddings left out).
        final: ``[T, D]``: output of the last norm.
        x, y: ``[T, D]`` per transcoder site: the MLP's input and output there.
    """

    layers: tuple[FrozenLayer, ...]
    parallel: bool
    final_norm: FrozenNorm
    embedding: Tensor
    final: Tensor
    x: tuple[Tensor, ...]
    y: tuple[Tensor, ...]


def layer_weights(model: nn.Module, *, dtype: torch.dtype) -> tuple[LayerWeights, ...]:
    """Folded attention weights of every layer in ``dtype``: copies of the value and output projections, no more.

    Projections that are not plain linear layers (PEFT adapters, quantised weights) are read by sending the identity
    matrix through them.

    Args:
        model: a transformers causal language model of a supported family.
        dtype: of the result; folding is done in at least float32.

    Raises:
        ValueError: not a supported model.
    """
    parts = anatomy(model)
    with torch.no_grad(), evaluating(model):
        return tuple(_weights_of(model, parts, layer, dtype) for layer in parts.layers)


def _weights_of(model: nn.Module, parts: Anatomy, layer: LayerAnatomy, dtype: torch.dtype) -> LayerWeights:
    heads, kv_heads, size = parts.n_heads, parts.n_kv_heads, parts.head_dim
    value = _wide(_matrix(model.get_submodule(layer.attn_value), parts.d_model))
    if parts.qkv_layout == "contiguous_thirds":
        value = value[-kv_heads * size :]
    elif parts.qkv_layout == "per_head_interleaved":
        value = value.view(heads, 3, size, parts.d_model)[:, 2]
    value = value.reshape(kv_heads, size, parts.d_model) * norm_gain(model, layer.attn_norm, parts)
    if parts.norm == "layer":
        value = value - value.mean(-1, keepdim=True)
    output = _wide(_matrix(model.get_submodule(layer.attn_output), heads * size))
    if layer.attn_post_norm is not None:
        output = output * norm_gain(model, layer.attn_post_norm, parts)[:, None]
    output = output.reshape(parts.d_model, heads, size).transpose(0, 1)
    return LayerWeights(value.to(dtype).contiguous(), output.to(dtype).contiguous())


def _matrix(projection: nn.Module, width: int) -> Tensor:
    """``W [out, in]`` of a module that computes ``x W^T + b``."""
    if type(projection) is nn.Linear:
        return projection.weight
    if type(projection).__name__ == "Conv1D":
        weight: Any = projection.weight
        return weight.T
    parameter = next(projection.parameters())
    probes = torch.cat([torch.eye(width), torch.zeros(1, width)])
    answers = projection(
        probes.to(parameter.device, parameter.dtype if parameter.is_floating_point() else probes.dtype)
    )
    return (answers[:-1] - answers[-1]).T


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def norm_gain(model: nn.Module, path: str, parts: Anatomy) -> Tensor:
    """Gain ``[D]`` of a norm, at least float32, whatever the family stores."""
    weight: Any = model.get_submodule(path).weight
    return _wide(weight) + parts.gain_offset


def freeze(
    model: nn.Module,
    input_ids: Tensor,
    sites: list[Site],
    *,
    dtype: torch.dtype,
    weights: tuple[LayerWeights, ...] | None = None,
) -> FrozenModel:
    """Runs the model once on one prompt and keeps what is constant in its local replacement model.

    The model is put into evaluation mode and eager attention for the one forward, and back afterwards. Memory: the
    weights, and ``L H T^2`` numbers for the patterns. Each layer's pattern is taken as the forward passes it.

    Args:
        model: a transformers causal language model of a supported family, also inside a PEFT wrapper.
        input_ids: ``[T]`` token ids.
        sites: where the transcoders sit.
        dtype: of everything but the weights: float32, or float64 for a float64 model.
        weights: from :func:`layer_weights`, to share them between prompts; by default made here, in ``dtype``.

    Raises:
        ValueError: a prompt longer than the context, token ids outside the vocabulary, no supported model.
    """
    parts = anatomy(model)
    _check_ids(input_ids, parts)
    weights = layer_weights(model, dtype=dtype) if weights is None else weights
    recorder = _Recorder(model, parts, dtype)
    with (
        torch.no_grad(),
        evaluating(model),
        _eager(model),
        recorder.listening(),
        capture(model, sites) as seen,
    ):
        trunk = model.get_submodule(parts.trunk)
        embed: Any = model.get_submodule(parts.embed)
        trunk(input_ids=input_ids[None].to(embed.weight.device), use_cache=False)  # pyright: ignore[reportArgumentType]
        layers = tuple(recorder.layer(layer, weights[layer]) for layer in range(parts.n_layers))
        return FrozenModel(
            layers=layers,
            parallel=parts.parallel,
            final_norm=recorder.norm(parts.final_norm),
            embedding=recorder.embedding(),
            final=recorder.final.to(dtype),
            x=tuple(x[0].to(dtype) for x in seen.x),
            y=tuple(y[0].to(dtype) for y in seen.y),
        )


def _check_ids(input_ids: Tensor, parts: Anatomy) -> None:
    if input_ids.ndim != 1 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids: expected integers [T] with T >= 1, got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if input_ids.shape[0] > parts.max_positions:
        raise ValueError(
            f"prompt: expected at most {parts.max_positions} tokens (the model's context), got {input_ids.shape[0]}"
        )
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= parts.vocab_size:
        raise ValueError(f"input_ids: expected ids in [0, {parts.vocab_size}), got {low} to {high}")


class _Recorder:
    """Hooks that take norm scales, patterns and the embedding out of one forward."""

    def __init__(self, model: nn.Module, parts: Anatomy, dtype: torch.dtype) -> None:
        self.model, self.parts, self.dtype = model, parts, dtype
        self.scales: dict[str, Tensor] = {}
        self.patterns: dict[str, Tensor] = {}
        self.entry = torch.empty(0)
        self.final = torch.empty(0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as stack:
            for path in self._norms():
                stack.callback(self._module(path).register_forward_pre_hook(self._take_scale(path)).remove)
            for layer in self.parts.layers:
                stack.callback(
                    self._module(layer.attn).register_forward_hook(self._take_pattern(layer)).remove
                )
            first = self._module(self.parts.layers[0].block)
            stack.callback(first.register_forward_pre_hook(self._take_entry, with_kwargs=True).remove)
            stack.callback(self._module(self.parts.final_norm).register_forward_hook(self._take_final).remove)
            yield

    def _module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def _norms(self) -> list[str]:
        paths = [self.parts.final_norm]
        for layer in self.parts.layers:
            paths += [
                layer.attn_norm,
                layer.mlp_norm,
                *(path for path in (layer.attn_post_norm, layer.mlp_post_norm) if path is not None),
            ]
        return paths

    def _take_scale(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            resid = _wide(args[0][0])
            if self.parts.norm == "layer":
                resid = resid - resid.mean(-1, keepdim=True)
            self.scales[path] = torch.rsqrt(resid.pow(2).mean(-1) + norm_eps(module)).to(self.dtype)

        return hook

    def _take_pattern(self, layer: LayerAnatomy) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            # Norms before and after the attention: the one has run, the other reads this module's output next.
            self.patterns[layer.attn] = output[1][0].to(self.dtype) * self.scales[layer.attn_norm]

        return hook

    def _take_entry(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entry = (args[0] if args else kwargs["hidden_states"])[0]

    def _take_final(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.final = output[0]

    def norm(self, path: str) -> FrozenNorm:
        gain = norm_gain(self.model, path, self.parts).to(self.dtype)
        return FrozenNorm(self.scales[path], gain, self.parts.norm == "layer")

    def layer(self, number: int, weights: LayerWeights) -> FrozenLayer:
        layer = self.parts.layers[number]
        pattern = self.patterns.pop(layer.attn)
        if layer.attn_post_norm is not None:
            pattern *= self.scales[layer.attn_post_norm][:, None]
        post = None if layer.mlp_post_norm is None else self.norm(layer.mlp_post_norm)
        return FrozenLayer(weights, pattern, self.norm(layer.mlp_norm), post)

    def embedding(self) -> Tensor:
        """The first layer's input without the position embedding."""
        entry = self.entry
        if self.parts.position_embed is not None:
            positions = torch.arange(entry.shape[0], device=entry.device)
            entry = entry - self._module(self.parts.position_embed)(positions)
        return entry.to(self.dtype)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Eager attention, which alone returns its patterns."""
    inner: Any = unwrap(model)[1]
    before = inner.config._attn_implementation
    if before == "eager":
        yield
        return
    inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


@dataclass(frozen=True)
class Unembedding:
    """The last step from residual to logits.

    Attributes:
        weight: ``[V, D]``, the model's own tensor where it has a plain one.
        bias: ``[V]`` or None.
        softcap: ``c`` where logits are ``c tanh(z / c)``, or None.
        mean: ``[D]`` mean row of ``weight``, at least float32. Kept between calls until the weights change.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    mean: Tensor

    def logits(self, final: Tensor) -> Tensor:
        """``[..., V]`` from outputs ``[..., D]`` of the last norm, soft-capped, in the dtype of ``final``."""
        logits = (final.to(self.weight.dtype) @ self.weight.T).to(final.dtype)
        if self.bias is not None:
            logits = logits + self.bias.to(final.dtype)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


_MEAN_ROWS: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()
_ROWS_PER_STEP = 1 << 14


@torch.no_grad()
def unembedding(model: nn.Module) -> Unembedding:
    """The unembedding of ``model``. The pass over the whole vocabulary for its mean row is made once per model."""
    parts = anatomy(model)
    head: Any = model.get_submodule(parts.lm_head)
    weight = _matrix(head, parts.d_model).detach()
    state = (weight.data_ptr(), weight._version)
    if _MEAN_ROWS.get(head, (None,))[0] != state:
        total = _wide(weight[:0]).sum(0)
        for rows in weight.split(_ROWS_PER_STEP):
            total = total + _wide(rows).sum(0)
        _MEAN_ROWS[head] = (state, total / len(weight))
    bias = getattr(head, "bias", None)
    return Unembedding(weight, bias, parts.final_softcap, _MEAN_ROWS[head][1])
