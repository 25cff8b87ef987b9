"""Checks on the arguments of the public ops: each error says what was expected and what came."""

from torch import Tensor

FLOATS = "float16, bfloat16, float32 or float64"


def check_matrix(name: str, tensor: Tensor, rows: str = "F", columns: str = "D") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor [{rows}, {columns}], got {type(tensor).__name__}")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected shape [{rows}, {columns}], got {list(tensor.shape)}")
    check_float(name, tensor)


def check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected {FLOATS}, got {tensor.dtype}")


def check_vector(name: str, tensor: Tensor, size: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor [{size}], got {type(tensor).__name__}")
    if tuple(tensor.shape) != (size,):
        raise ValueError(f"{name}: expected shape [{size}], got {list(tensor.shape)}")


def check_last_dim(name: str, tensor: Tensor, size: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor [..., {size}], got {type(tensor).__name__}")
    check_float(name, tensor)
    if tensor.dim() == 0 or tensor.shape[-1] != size:
        raise ValueError(f"{name}: expected shape [..., {size}], got {list(tensor.shape)}")


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected all tensors on one device, got {got}")
