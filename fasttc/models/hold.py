"""Runs a model beside its original: attention patterns and norm scales held where they were without the changes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fasttc.models._patch import patched_forward
from fasttc.models.anatomy import Anatomy, anatomy, unwrap
from fasttc.models.norms import scale_held

_ATTENTION = "fasttc_held"  # its name among transformers' attention functions
_HELD: WeakKeyDictionary[nn.Module, "Held"] = WeakKeyDictionary()  # attention module -> who holds it


class Held:
    """What :func:`held` yields: which pass is running, and where in the sequence.

    Attributes:
        original: the running pass is the original one; whoever changes the model must not do so in it.
        start: position of the running forward's first token: the number of tokens in the cache.
        prompt: tokens of the forward that began the sequence.
        patterns: of each attention module, ``[batch, H, new tokens, all tokens]``, in the original pass.
    """

    def __init__(self) -> None:
        self.original = False
        self.start = 0
        self.prompt = 0
        self.patterns: dict[nn.Module, Tensor] = {}
        self._cache: Any = None

    def begin(self, past: Any, tokens: Tensor) -> None:
        """A forward begins that continues the sequence in ``past`` with ``tokens [batch, new, ...]``."""
        self.start = 0 if past is None else int(past.get_seq_length())
        if self.start == 0:
            self.prompt = tokens.shape[1]

    def cache_for(self, past: Any, config: Any, batch: int) -> Any:
        """The original's own cache, as long as ``past``."""
        from transformers import DynamicCache

        if self.start == 0:
            self._cache = DynamicCache(config=config) if past is None else deepcopy(past)
            return self._cache
        own = 0 if self._cache is None else int(self._cache.get_seq_length())
        if own != self.start:
            raise ValueError(
                f"cache: expected one begun in this context ({own} tokens), got {self.start} tokens"
            )
        if batch != 1:  # beams would be re-ordered in the one cache and not in the other
            raise ValueError(f"batch: expected one sequence where a cache meets held values, got {batch}")
        return self._cache


@contextmanager
def held(
    model: nn.Module, *, attention: bool = False, norms: bool = False, original: bool = False
) -> Iterator[Held]:
    """Inside, attention patterns or norm scales are those of the original model on the same tokens.

    Every forward of the model (or of its trunk) then runs twice: first as the original, where ``Held.original`` is
    set, with a cache of its own, then with whatever was changed, on held values. Works with ``generate()``: patterns
    and scales of generated tokens are those that the original has on them. Without changes in between, the second
    pass has the bits of the first. On exit, also by an exception, the model is as before.

    Args:
        model: a model of a supported family, in evaluation mode.
        attention: holds the patterns. Attention is eager inside.
        norms: holds the scale of every norm of the residual stream and of what is added to it.
        original: runs the original pass even if nothing is held.

    Yields:
        Positions and passes; with none of the three there is one pass only.

    Raises:
        ValueError: already held; inside, a cache that was begun outside, or several sequences that continue a cache.
    """
    parts = anatomy(model)
    state = Held()
    trunk: Any = model.get_submodule(parts.trunk)
    with ExitStack() as stack:
        if attention:
            stack.enter_context(_attention_held(model, parts, state))
        if norms:
            for path in _norms(parts):
                norm = model.get_submodule(path)
                stack.enter_context(scale_held(norm, parts.gain_offset, lambda: state.original))
        twice = attention or norms or original
        stack.enter_context(patched_forward(trunk, _passes(trunk, state, twice)))
        yield state


def _passes(trunk: Any, state: Held, twice: bool) -> Callable[..., Any]:
    true_forward = trunk.forward
    # transformers 5 renamed the argument.
    name = "cache" if "cache" in signature(type(trunk).forward).parameters else "past_key_values"

    def forward(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            kwargs[name] = kwargs.pop("past_key_values")
        past, tokens = kwargs.get(name), args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        state.begin(past, tokens)
        if twice:
            own = state.cache_for(past, trunk.config, tokens.shape[0])
            state.original = True
            try:
                with torch.no_grad():
                    true_forward(*args, **(kwargs | {name: own}))
            finally:
                state.original = False
        return true_forward(*args, **kwargs)

    return forward


@contextmanager
def _attention_held(model: nn.Module, parts: Anatomy, state: Held) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_ATTENTION, _held_attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    modules = [model.get_submodule(layer.attn) for layer in parts.layers]
    if any(module in _HELD for module in modules):
        raise ValueError("attention: expected patterns that are not held yet, got some that are")
    inner: Any = unwrap(model)[1]
    before = inner.config._attn_implementation
    _HELD.update(dict.fromkeys(modules, state))
    try:
        inner.set_attn_implementation(_ATTENTION)
        yield
    finally:
        inner.set_attn_implementation(before)
        for module in modules:
            del _HELD[module]


def _held_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention in transformers' interface: eager in the original pass, by the pattern kept from it in the other."""
    state = _HELD[module]
    if state.original:
        eager: Any = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        output, pattern = eager(module, query, key, value, attention_mask, **options)
        state.patterns[module] = pattern
        return output, pattern
    pattern = state.patterns[module]
    value = value.repeat_interleave(pattern.shape[1] // value.shape[1], dim=1)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


def _norms(parts: Anatomy) -> list[str]:
    paths = [parts.final_norm]
    for layer in parts.layers:
        paths += [layer.attn_norm, layer.mlp_norm]
        paths += [path for path in (layer.attn_post_norm, layer.mlp_post_norm) if path is not None]
    return paths
