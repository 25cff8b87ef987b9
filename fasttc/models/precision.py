"""``float64_exact``: a transformers model in float64, with nothing left in float32.

``model.double()`` is not enough. transformers casts to float32 inside RMS norms, the softmax of eager attention and
the rotary tables, and keeps constants (rotary frequencies, Gemma's embedding scale) that were rounded to float32
when the model was built. All of these are overridden here, in any version of transformers, by one rule: *inside
the model, float32 means float64*.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fasttc.models._patch import patched_attributes, patched_forward
from fasttc.models.anatomy import Anatomy, anatomy

_EXACT_NORMS: WeakSet[nn.Module] = WeakSet()
_ACTIVE: ContextVar[bool] = ContextVar("float32_means_float64", default=False)


class _Float32MeansFloat64(TorchFunctionMode):
    """Every request for float32 (a cast, a result dtype, a new tensor) is answered with float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _ACTIVE.get():
            return func(*args, **(kwargs or {}))
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(_widened(value) for value in args)
        kwargs = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def _float32_means_float64() -> Iterator[None]:
    if _ACTIVE.get():  # called from a module that is already inside
        yield
        return
    token = _ACTIVE.set(True)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # for tensors made from numbers, without a dtype
    try:
        with _Float32MeansFloat64():
            yield
    finally:
        torch.set_default_dtype(previous)
        _ACTIVE.reset(token)


@contextmanager
def ordinary_precision() -> Iterator[None]:
    """Inside a model that is in :func:`float64_exact`: float32 means float32 again, for code that is not its own."""
    if not _ACTIVE.get():
        yield
        return
    token = _ACTIVE.set(False)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
        _ACTIVE.reset(token)


def is_exact(norm: nn.Module) -> bool:
    """Whether ``norm`` belongs to a model that is inside :func:`float64_exact` now."""
    return norm in _EXACT_NORMS


@contextmanager
def float64_exact(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` computes in float64 throughout: norms, softmax, rotary tables, embedding scale, loss.

    Covers the model's own forward and, called one by one, its trunk, norms, attention and rotary modules. Nothing
    outside the model is affected. On exit, also by an exception, everything is as before. Weights are not touched;
    those loaded from float32 are exact in float64 anyway.

    Args:
        model: all floating-point parameters in float64 (``model.double()``), eager attention.

    Raises:
        ValueError: a parameter that is not float64, or attention that is not eager (fused kernels decide their own
            precision), or an unknown family.
    """
    parts = anatomy(model)
    root = model.get_submodule(parts.root)
    _check(root)
    with ExitStack() as stack:
        for module in _rotary_modules(root):
            stack.enter_context(_rotary_in_float64(module))
        embed = model.get_submodule(parts.embed)
        rounded = embed._buffers.get("embed_scale")
        if rounded is not None:
            scale = torch.tensor(parts.embed_scale, dtype=torch.float64, device=rounded.device)
            stack.enter_context(_buffers(embed, {"embed_scale": scale}))
        for module in root.modules():
            if getattr(module, "reorder_and_upcast_attn", False):
                # GPT-2's variant refuses anything but float32; in float64 it is the plain path in another order.
                stack.enter_context(patched_attributes(module, reorder_and_upcast_attn=False))
        for module in _modules_that_round(model, parts, root):
            stack.enter_context(patched_forward(module, _widened_forward(module.forward)))
        norms = [module for module in root.modules() if _is_norm(module) and module not in _EXACT_NORMS]
        stack.callback(lambda: [_EXACT_NORMS.discard(norm) for norm in norms])
        _EXACT_NORMS.update(norms)
        yield


def _check(root: nn.Module) -> None:
    for name, parameter in root.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float64:
            raise ValueError(
                f"float64_exact: expected a model in float64 (model.double()), got {parameter.dtype} in {name}"
            )
    config: Any = root.config
    if config._attn_implementation != "eager":
        raise ValueError(
            f"float64_exact: expected eager attention, got {config._attn_implementation!r}; "
            "load the model with attn_implementation='eager'"
        )


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def _rotary_modules(root: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in root.modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]


def _modules_that_round(model: nn.Module, parts: Anatomy, root: nn.Module) -> list[nn.Module]:
    chosen = [root, model.get_submodule(parts.trunk)]
    chosen += [model.get_submodule(layer.attn) for layer in parts.layers]
    chosen += _rotary_modules(root)
    chosen += [module for module in root.modules() if _is_norm(module)]
    return list(dict.fromkeys(chosen))


def _widened_forward(forward: Any) -> Any:
    @wraps(forward)  # generate() inspects the signature
    def widened(*args: Any, **kwargs: Any) -> Any:
        with _float32_means_float64():
            return forward(*args, **kwargs)

    return widened


@contextmanager
def _rotary_in_float64(module: nn.Module) -> Iterator[None]:
    """The module's frequencies as its own class computes them when float32 means float64."""
    with _float32_means_float64():
        fresh: Any = type(module)(module.config)  # pyright: ignore[reportCallIssue]
    device = next(module.buffers()).device
    tensors = {name: value.to(device) for name, value in vars(fresh).items() if isinstance(value, Tensor)}
    buffers = {name: value.to(device) for name, value in fresh._buffers.items()}
    with _buffers(module, buffers), patched_attributes(module, **tensors):
        yield


@contextmanager
def _buffers(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    previous = dict(module._buffers)
    module._buffers.update(values)
    try:
        yield
    finally:
        module._buffers.clear()
        module._buffers.update(previous)
