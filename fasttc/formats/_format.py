"""What a checkpoint format is to this package: a name, how it is recognised, how it is read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fasttc.nn.io import Kind, ReadSet


@dataclass(frozen=True)
class Format:
    """A foreign format.

    Attributes:
        name: what ``sniff`` returns.
        recognises: whether a folder is in this format, from file names and small files alone.
        read: the folder as lazy layers, sites and metadata. Everything that the headers can prove wrong is refused
            here, the rest when a layer's weights are read.
        kind: what a folder in this format holds.
    """

    name: str
    recognises: Callable[[Path], bool]
    read: ReadSet
    kind: Kind = "transcoders"


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes from the header of a safetensors file; a missing or damaged file is a ``ValueError``."""
    try:
        with safe_open(file, framework="pt") as source:
            return {key: tuple(source.get_slice(key).get_shape()) for key in source.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"expected a safetensors file, cannot read {file}: {error}") from error


def scalar(file: Path, name: str) -> int:
    """One integer out of a safetensors file."""
    with safe_open(file, framework="pt") as source:
        tensor = source.get_tensor(name)
    if tensor.numel() != 1 or tensor.is_floating_point():
        raise ValueError(f"{file}: {name} expected one integer, got {tensor.dtype} {list(tensor.shape)}")
    return int(tensor)
