"""Replaces what MLPs contribute, for a while: by transcoders, by nothing, or by any function."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fasttc.models._patch import patched_forward
from fasttc.models.anatomy import Anatomy, anatomy
from fasttc.models.precision import ordinary_precision
from fasttc.models.sites import bind, check_match, chosen_layers, first_tensor, on_input
from fasttc.nn import AdapterSet, Site, Transcoder, TranscoderSet

Override = Callable[[Tensor, Tensor | None], Tensor]
_OVERRIDDEN: WeakSet[nn.Module] = WeakSet()


@contextmanager
def overridden(
    model: nn.Module, sites: Sequence[Site], functions: Sequence[Override], *, needs_output: bool = True
) -> Iterator[nn.Module]:
    """Inside, the value at each site's output is ``function(x, y)`` instead of the true ``y``.

    At "mlp_out_post" of a model with post-norms, MLP and post-norm are replaced together. Works with ``generate()``
    and a cache (``x`` then holds the new tokens only), inside PEFT wrappers and for modules called by keyword. On
    exit, also by an exception, the model is as before. With gradient checkpointing, run the backward pass inside.

    Args:
        model: a model of a supported family.
        sites: at most one per layer; bound here.
        functions: one per site. ``x [batch, T, D]`` is the input at the site; ``y`` is the true output, or None; the
            result is ``[batch, T, D]``. Gradients flow through it.
        needs_output: False skips the true MLPs (and post-norms) and passes None. Whoever hooks an MLP that was
            skipped before a post-norm sees NaN.

    Raises:
        ValueError: a layer twice, or one that is overridden already (combine the functions instead), or one the
            model does not have; inside, a result of another shape.
    """
    parts = anatomy(model)
    bound = bind(parts, sites)
    if len(functions) != len(bound):
        raise ValueError(f"functions: expected one per site ({len(bound)}), got {len(functions)}")
    with ExitStack() as stack:
        for site, function in zip(bound, functions, strict=True):
            stack.enter_context(_override(model, parts, site, function, needs_output))
        yield model


@contextmanager
def _override(
    model: nn.Module, parts: Anatomy, site: Site, function: Override, needs_output: bool
) -> Iterator[None]:
    mlp, writer = model.get_submodule(parts.layers[site.layer].mlp), model.get_submodule(site.write)
    if mlp in _OVERRIDDEN:
        raise ValueError(f"layer {site.layer}: expected an MLP that is not overridden yet, got one that is")
    inputs: list[Tensor] = []
    true_forward = writer.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        output = true_forward(*args, **kwargs) if needs_output else None
        x = inputs.pop()
        with ordinary_precision():
            result = function(x, output)
        if result.shape != x.shape:
            raise ValueError(
                f"function of layer {site.layer}: expected shape {list(x.shape)}, got {list(result.shape)}"
            )
        return result

    def receive(x: Tensor) -> None:
        inputs[:] = [x]

    with ExitStack() as stack:
        _OVERRIDDEN.add(mlp)
        stack.callback(_OVERRIDDEN.discard, mlp)
        stack.callback(on_input(model, parts, site, receive).remove)
        stack.enter_context(patched_forward(writer, forward))
        if writer is not mlp and not needs_output:
            stack.enter_context(patched_forward(mlp, _not_computed))
        yield


def _not_computed(*args: Any, **kwargs: Any) -> Tensor:
    x = first_tensor(args, kwargs)
    return x.new_full((), torch.nan).expand(x.shape)


@contextmanager
def replaced(
    model: nn.Module, tcs: TranscoderSet, *, error_terms: bool = False, layers: Sequence[int] | None = None
) -> Iterator[nn.Module]:
    """Inside, transcoders take the place of the MLPs, each at its own site. See :func:`overridden`.

    Args:
        model: a model of a supported family.
        tcs: a set with the model's width. Transcoders may lie on other devices and have another dtype; values are
            moved to them and back. BatchTopK ones should be in evaluation mode.
        error_terms: True adds to each reconstruction its true error, as a constant: values, and so logits, are
            bit-identical to the original's, while gradients flow through the transcoders only. The true MLPs run,
            too. False replaces them without running them.
        layers: only these layers of the model; None: all, and the set must have them all.

    Raises:
        ValueError: the set does not fit the model (both sides are named), or a layer is overridden already.
        TypeError: a set of adapters, which belong beside MLPs: see :func:`fasttc.models.hybrid`.
    """
    if isinstance(tcs, AdapterSet):
        raise TypeError("transcoders: expected a TranscoderSet, got an AdapterSet; see fasttc.models.hybrid")
    check_match(model, tcs, layers)
    positions = chosen_layers(anatomy(model), tcs, layers)
    sites = [tcs.sites[position] for position in positions]
    functions = [_reconstruction(tcs[position], error_terms) for position in positions]
    with overridden(model, sites, functions, needs_output=error_terms):
        yield model


def _reconstruction(transcoder: Transcoder, error_terms: bool) -> Override:
    def reconstruct(x: Tensor, output: Tensor | None) -> Tensor:
        reconstruction = transcoder(x.to(transcoder.W_enc.device)).to(x.device)
        if output is None:
            return reconstruction
        # Value: output + 0, exactly. Gradient: that of the reconstruction.
        return output.detach() + (reconstruction - reconstruction.detach())

    return reconstruct


@contextmanager
def ablated(model: nn.Module, layers: Sequence[int] | None = None) -> Iterator[nn.Module]:
    """Inside, the MLPs of the given layers (None: all) add nothing to the residual. See :func:`overridden`.

    Raises:
        ValueError: a layer the model does not have, or one that is overridden already.
    """
    chosen = range(anatomy(model).n_layers) if layers is None else sorted(set(layers))
    sites = [Site(layer, y="mlp_out_post") for layer in chosen]
    functions: list[Override] = [lambda x, output: torch.zeros_like(x)] * len(sites)
    with overridden(model, sites, functions, needs_output=False):
        yield model
