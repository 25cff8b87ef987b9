"""The residual stream, layer by layer, while the model runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fasttc.models.anatomy import anatomy
from fasttc.models.sites import first_tensor


@contextmanager
def residuals(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, every forward of ``model`` (or of its trunk alone) fills the yielded list anew, with L + 1 tensors.

    Entry l is the input of layer l (0: the embeddings), entry L that of the final norm: ``[batch, T, D]`` in the
    model's dtype, still in the graph, sharing memory with the model's own. Works inside
    :func:`fasttc.models.hybrid`. Changes nothing that the model computes; hooks are removed on exit.

    Raises:
        ValueError: an unknown family.
    """
    parts = anatomy(model)
    stream: list[Tensor] = []

    def store(first: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if first:
                stream.clear()
            stream.append(first_tensor(args, kwargs))

        return hook

    places = [*(layer.block for layer in parts.layers), parts.final_norm]
    handles = [
        model.get_submodule(place).register_forward_pre_hook(store(i == 0), with_kwargs=True)
        for i, place in enumerate(places)
    ]
    try:
        yield stream
    finally:
        for handle in handles:
            handle.remove()
