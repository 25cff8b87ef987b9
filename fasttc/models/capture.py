"""Reads the input and output of every MLP while the model runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasttc.models.anatomy import anatomy
from fasttc.models.precision import ordinary_precision
from fasttc.models.sites import bind, on_input
from fasttc.nn import Site

OnLayer = Callable[[int, Tensor, Tensor], None]


class Capture:
    """What :func:`capture` yields.

    Attributes:
        sites: the bound sites.
        x: after a forward, the input at each site, ``[batch, T, D]`` in the model's dtype; None before.
        y: the output at each site, likewise. Both stay None where ``on_layer`` takes them.
    """

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.x: list[Any] = [None] * len(sites)
        self.y: list[Any] = [None] * len(sites)

    def clear(self) -> None:
        """Forgets all tensors. Every forward begins with this."""
        self.x[:] = [None] * len(self.sites)
        self.y[:] = [None] * len(self.sites)


@contextmanager
def capture(
    model: nn.Module, sites: Sequence[Site], *, detach: bool = True, on_layer: OnLayer | None = None
) -> Iterator[Capture]:
    """Inside, every forward of ``model`` (or of its trunk alone) fills ``x`` and ``y``, in the order of ``sites``.

    Works inside PEFT wrappers and with ``generate()``, where each step overwrites the last. Inside
    :func:`fasttc.models.replaced`, ``y`` is what the model really used. Changes nothing that the model computes;
    hooks are removed on exit, also by an exception.

    Args:
        model: a model of a supported family.
        sites: where to read; bound here, so unbound ones will do. Any subset of the layers.
        detach: cuts the tensors from the graph. They share memory with the model's own. With False, a "normalized"
            ``x`` depends on the residual, but, computed beside the model's norm, nothing depends on it.
        on_layer: ``on_layer(index, x, y)`` is called as soon as a layer's MLP has run, and nothing is kept, so that
            no more than one layer's tensors live at a time. The index counts ``sites``.

    Raises:
        ValueError: a layer the model does not have, or an unknown family.
    """
    parts = anatomy(model)
    record = Capture(bind(parts, sites))
    handles: list[RemovableHandle] = []
    try:
        trunk = model.get_submodule(parts.trunk)
        handles.append(trunk.register_forward_pre_hook(lambda *_: record.clear()))
        for index, site in enumerate(record.sites):
            handles.append(on_input(model, parts, site, _store(record.x, index), detach=detach))
            writer = model.get_submodule(site.write)
            handles.append(writer.register_forward_hook(_on_output(record, index, detach, on_layer)))
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _store(values: list[Any], index: int) -> Callable[[Tensor], None]:
    def store(value: Tensor) -> None:
        values[index] = value

    return store


def _on_output(record: Capture, index: int, detach: bool, on_layer: OnLayer | None) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        value = output.detach() if detach else output
        if on_layer is None:
            record.y[index] = value
            return
        x, record.x[index] = record.x[index], None
        with ordinary_precision():
            on_layer(index, x, value)

    return hook
