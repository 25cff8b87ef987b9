"""Modules changed for a while and put back: attributes of an instance, its forward, its mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def patched_attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """Sets plain instance attributes (no parameters, buffers or modules); restores them on exit."""
    own = vars(module)
    previous = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            if name in previous:
                own[name] = previous[name]
            else:
                own.pop(name, None)


@contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives one module instance another ``forward``; its class and its hooks are not touched."""
    with patched_attributes(module, forward=forward):
        yield


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Everything in evaluation mode; each submodule gets its own mode back on exit, also by an exception."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in before:
        part.training = False
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
