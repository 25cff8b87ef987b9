"""The hybrid of two models, with the MLPs of the base in the fine-tuned one, and adapters beside MLPs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fasttc.models.anatomy import Anatomy, anatomy
from fasttc.models.replace import Override, overridden
from fasttc.models.sites import bind, check_match
from fasttc.nn import AdapterSet, Site, TranscoderAdapter

Contribution = Callable[[Tensor], Tensor]


def adapter_sites(model: nn.Module) -> list[Site]:
    """One bound site per layer for adapters: the MLP module's own input and output, in every family."""
    parts = anatomy(model)
    return bind(parts, [Site(layer, "mlp_in", "mlp_out") for layer in range(parts.n_layers)])


@contextmanager
def hybrid(
    target: nn.Module,
    base: nn.Module,
    adapters: AdapterSet | Mapping[int, Contribution] | None = None,
    *,
    layers: Sequence[int] | None = None,
) -> Iterator[nn.Module]:
    """Inside, ``target`` runs with the MLPs of ``base``, and with adapters beside them where they are given.

    Attention, embeddings, norms (Gemma's norm after the MLP, too) and head stay the target's::

        h' = h + Attn_target(h)        h_next = h' + post_norm_target( MLP_base(x) + T(x) ),   x = norm_target(h')

    Nothing is copied; of the base only the MLP modules run. Works with ``generate()`` and a cache; gradients flow to
    the adapters and, where parameters ask for them, to both models. On exit the target is as it was. See
    :func:`fasttc.models.overridden`.

    Args:
        target: the fine-tuned model.
        base: the model it came from: same family, shapes and vocabulary. It may lie on another device.
        adapters: of all layers of the hybrid, or more; None: the hybrid without adapters. Or any functions from x
            [batch, T, D] to what is added, by layer.
        layers: only these layers are the base's, the others stay the target's own; None: all.

    Raises:
        ValueError: models or adapters that do not fit one another, both sides named; the same model twice; a layer
            that is overridden already.
    """
    parts, base_parts = check_pair(target, base)
    chosen = range(parts.n_layers) if layers is None else sorted(set(layers))
    beside = _by_layer(target, adapters, list(chosen))
    functions = []
    for layer in chosen:
        if layer >= base_parts.n_layers:
            raise ValueError(f"layers: expected layers of the model (0 to {parts.n_layers - 1}), got {layer}")
        mlp = base.get_submodule(base_parts.layers[layer].mlp)
        functions.append(_base_mlp(mlp, beside.get(layer)))
    sites = [Site(layer, "mlp_in", "mlp_out") for layer in chosen]
    with overridden(target, sites, functions, needs_output=False):
        yield target


@contextmanager
def steered(model: nn.Module, adapters: AdapterSet) -> Iterator[nn.Module]:
    """Inside, adapters are added to the outputs of the model's own MLPs.

    With ``adapters.scaled(-0.5)`` beside the fine-tuned model this takes back part of what it has learned; beside a
    base model with the target's other weights it is the same as :func:`hybrid`.

    Raises:
        ValueError: adapters that do not fit the model, or a layer that is overridden already.
    """
    beside = _by_layer(model, adapters, adapters.layers)
    functions: list[Override] = [_add(beside[layer]) for layer in adapters.layers]
    with overridden(model, adapters.sites, functions):
        yield model


def check_pair(target: nn.Module, base: nn.Module) -> tuple[Anatomy, Anatomy]:
    """Anatomies of a fine-tuned model and its base, once they are found to be of one shape.

    Raises:
        ValueError: the same object twice, or a difference, with both sides.
    """
    if target is base:
        raise ValueError("base: expected another model than the target, got the same object twice")
    found = anatomy(target), anatomy(base)
    for name in ("family", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "vocab_size"):
        ours, theirs = (getattr(parts, name) for parts in found)
        if ours != theirs:
            raise ValueError(f"base: expected {name} {ours!r} (the target's), got {theirs!r}")
    for layer, (ours, theirs) in enumerate(zip(found[0].layers, found[1].layers, strict=True)):
        shapes = [
            {name: tuple(p.shape) for name, p in model.get_submodule(place.mlp).named_parameters()}
            for model, place in ((target, ours), (base, theirs))
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(f"base: layer {layer}: expected an MLP of {shapes[0]}, got {shapes[1]}")
    return found


def check_same_tokenizer(target: Any, base: Any) -> None:
    """Fails with a ``ValueError`` unless two tokenizers have the same vocabulary; None stands for "not known"."""
    vocabularies = [tokenizer.get_vocab() for tokenizer in (target, base) if hasattr(tokenizer, "get_vocab")]
    if len(vocabularies) == 2 and vocabularies[0] != vocabularies[1]:
        ours, theirs = vocabularies
        differing = sorted(
            token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
        )
        raise ValueError(
            f"base: expected the target's tokenizer, got one that differs in {len(differing)} tokens "
            f"({', '.join(map(repr, differing[:3]))}, ...)"
        )


def _by_layer(
    model: nn.Module, adapters: AdapterSet | Mapping[int, Contribution] | None, layers: list[int]
) -> Mapping[int, Contribution]:
    if adapters is None or isinstance(adapters, Mapping):
        return adapters or {}
    if not isinstance(adapters, AdapterSet):
        raise TypeError(f"adapters: expected an AdapterSet, got {type(adapters).__name__}")
    check_match(model, adapters, layers)
    return {
        site.layer: _contribution(adapter) for site, adapter in zip(adapters.sites, adapters, strict=True)
    }


def _base_mlp(mlp: nn.Module, contribution: Contribution | None) -> Override:
    place = next(mlp.parameters())

    def function(x: Tensor, output: Tensor | None) -> Tensor:
        base = mlp(x.to(place)).to(x)
        return base if contribution is None else base + contribution(x)

    return function


def _add(contribution: Contribution) -> Override:
    def function(x: Tensor, output: Tensor | None) -> Tensor:
        assert output is not None, "overridden with needs_output gives the true output"
        return output + contribution(x)

    return function


def _contribution(adapter: TranscoderAdapter) -> Contribution:
    return lambda x: adapter(x.to(adapter.W_enc.device)).to(x.device)
