"""Gradient checkpointing: activations inside a block are computed again when its gradient is."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fasttc.models._patch import patched_forward
from fasttc.models.anatomy import anatomy


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Inside, a backward pass through ``model`` keeps the inputs of its blocks alone and runs each block once more.

    The gradients have the same bits. Works in evaluation mode, where the switch of transformers does nothing. Run the
    model without a cache.

    Args:
        model: of a supported family, PEFT wrappers included.
    """
    with ExitStack() as stack:
        for layer in anatomy(model).layers:
            block = model.get_submodule(layer.block)
            stack.enter_context(patched_forward(block, _checkpointed(block.forward)))
        yield


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
