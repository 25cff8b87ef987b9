"""Sites of a model: which ones are usual, where they lie in its modules, whether a transcoder set fits them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasttc.models.anatomy import Anatomy, LayerAnatomy, anatomy
from fasttc.models.families import FAMILIES
from fasttc.models.norms import normalized
from fasttc.nn import Site, TranscoderSet


def default_sites(model: nn.Module) -> list[Site]:
    """One bound site per layer, where the public transcoders of the model's family read and write.

    Gemma-2 (Gemma Scope): "normalized" to "mlp_out_post". Gemma-3 (Gemma Scope 2): "mlp_in" to "mlp_out_post".
    All others: "mlp_in" to "mlp_out".

    Raises:
        ValueError: unknown family.
    """
    parts = anatomy(model)
    family = FAMILIES[parts.family]
    return [_bound(Site(layer, family.x, family.y), place) for layer, place in enumerate(parts.layers)]


def bind_sites(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """The same sites with ``read`` and ``write`` set to module paths of ``model``, valid for ``get_submodule``.

    Paths of another model that are already there are replaced.

    Raises:
        ValueError: a layer the model does not have, or an unknown family.
    """
    return bind(anatomy(model), sites)


def bind(parts: Anatomy, sites: Iterable[Site]) -> list[Site]:
    """:func:`bind_sites` for an anatomy that is known already."""
    bound = []
    for site in sites:
        if site.layer >= parts.n_layers:
            raise ValueError(
                f"site: expected a layer of the model (0 to {parts.n_layers - 1}), got layer {site.layer}"
            )
        bound.append(_bound(site, parts.layers[site.layer]))
    return bound


def _bound(site: Site, place: LayerAnatomy) -> Site:
    after_norm = site.y == "mlp_out_post" and place.mlp_post_norm is not None
    return replace(site, read=place.mlp_norm, write=place.mlp_post_norm if after_norm else place.mlp)


def on_input(
    model: nn.Module, parts: Anatomy, site: Site, receive: Callable[[Tensor], None], *, detach: bool = False
) -> RemovableHandle:
    """Calls ``receive(x)`` with the input at a bound site, ``[batch, T, D]``, before the MLP runs in each forward."""
    norm = model.get_submodule(site.read)
    reader = model.get_submodule(parts.layers[site.layer].mlp) if site.x == "mlp_in" else norm

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = first_tensor(args, kwargs)
        value = value.detach() if detach else value
        receive(normalized(norm, value) if site.x == "normalized" else value)

    return reader.register_forward_pre_hook(hook, with_kwargs=True)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor a module was called with, by position or by name."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ValueError("module call: expected a tensor argument, got none")


def chosen_layers(parts: Anatomy, tcs: TranscoderSet, layers: Sequence[int] | None = None) -> list[int]:
    """Positions in ``tcs`` of the given layers (all of the model's when None), in ascending order.

    Raises:
        ValueError: a layer that the set or the model does not have, or, when ``layers`` is None, a set that does not
            have one transcoder for each of the model's layers.
    """
    of_model, of_set = list(range(parts.n_layers)), tcs.layers
    if layers is None:
        if of_set != of_model:
            hint = "; name the layers to use only some" if set(of_set) < set(of_model) else ""
            raise ValueError(
                f"transcoders: expected layers {_span(of_model)} of the model ({parts.n_layers}), "
                f"got layers {_span(of_set)} ({len(of_set)}){hint}"
            )
        return list(range(len(tcs)))
    wanted = sorted(set(layers))
    for name, present in (("the transcoder set", of_set), ("the model", of_model)):
        missing = [layer for layer in wanted if layer not in present]
        if missing:
            raise ValueError(f"layers: expected layers of {name} ({_span(present)}), got {missing}")
    return [of_set.index(layer) for layer in wanted]


def _span(layers: list[int]) -> str:
    contiguous = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if contiguous and len(layers) > 1 else ", ".join(map(str, layers))


def check_match(model: nn.Module, tcs: TranscoderSet, layers: Sequence[int] | None = None) -> None:
    """Checks that a transcoder set fits a model: the same layers and the same width. Reads the layers it checks.

    Args:
        model: a model of a supported family.
        tcs: one transcoder for each layer of the model, unless ``layers`` is given.
        layers: check only these layers of the model.

    Raises:
        ValueError: naming both sides, when layers or widths differ.
    """
    parts = anatomy(model)
    for index in chosen_layers(parts, tcs, layers):
        transcoder, layer = tcs[index], tcs.sites[index].layer
        for name, width in (("input", transcoder.d_in), ("output", transcoder.d_out)):
            if width != parts.d_model:
                raise ValueError(
                    f"transcoder of layer {layer}: expected {name} width {parts.d_model} (the model's), got {width}"
                )
