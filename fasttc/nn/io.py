"""Transcoder sets on disk: a folder with ``fasttc.json`` and a safetensors file per layer, whole or absent.

There are two kinds of set, which never pass for one another: "transcoders" stand in for MLPs, "adapters" beside them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fasttc._files import atomic_folder, read_json, write_json
from fasttc.nn.site import Site
from fasttc.nn.transcoder import Transcoder, TranscoderConfig

CONFIG_NAME = "fasttc.json"
SCHEMA_VERSION = 1

Loader = Callable[[], Transcoder]
"""Builds one layer's transcoder when it is first needed."""

ReadSet = Callable[[Path], tuple[list[Loader], list[Site], dict[str, Any]]]
"""Reads a folder as layer loaders (each taking no argument and returning CPU weights), sites and metadata."""

Kind = Literal["transcoders", "adapters"]
_readers: dict[str, tuple[Callable[[Path], bool], ReadSet, Kind]] = {}


def register_reader(
    name: str, recognises: Callable[[Path], bool], read: ReadSet, kind: Kind = "transcoders"
) -> None:
    """Adds a foreign checkpoint format. ``fasttc.formats`` registers every format it knows when imported."""
    _readers[name] = (recognises, read, kind)


def known_formats() -> list[str]:
    return ["fasttc", *_readers]


def format_of(path: Path) -> str:
    """Name of the format of the folder ``path``.

    Raises:
        ValueError: not a folder, or a folder of no known format.
    """
    if not path.is_dir():
        raise ValueError(f"transcoders: expected a folder, {path} does not exist or is a file")
    if (path / CONFIG_NAME).is_file():
        return "fasttc"
    name = next((name for name, (recognises, *_) in _readers.items() if recognises(path)), None)
    if name is None:
        raise ValueError(f"transcoders: {path} is in no known format; known: {', '.join(known_formats())}")
    return name


def kind_of(path: Path) -> str:
    """ "transcoders" or "adapters": what the folder ``path`` holds, or whatever else its header says.

    Raises:
        ValueError: as :func:`format_of`.
    """
    name = format_of(path)
    return _header(path)["format"].removeprefix("fasttc-") if name == "fasttc" else _readers[name][2]


def layer_file(layer: int) -> str:
    return f"layer_{layer}.safetensors"


def write_set(
    path: str | Path,
    transcoders: Sequence[Transcoder],
    sites: list[Site],
    metadata: dict[str, Any],
    kind: Kind = "transcoders",
) -> None:
    """Writes the native format. An existing folder is replaced only once the new one is complete."""
    with atomic_folder(path) as folder:
        for transcoder, site in zip(transcoders, sites, strict=True):
            tensors = {
                key: value.detach().contiguous().cpu() for key, value in transcoder.state_dict().items()
            }
            save_file(tensors, folder / layer_file(site.layer))
        write_header(folder, [transcoder.config for transcoder in transcoders], sites, metadata, kind)


def write_header(
    folder: Path,
    configs: Sequence[TranscoderConfig],
    sites: Sequence[Site],
    metadata: dict[str, Any],
    kind: Kind = "transcoders",
) -> None:
    """Writes the description of a set, whose layers' files :func:`layer_file` names."""
    layers = [
        {"file": layer_file(site.layer), "site": site.to_dict(), "config": config.to_dict()}
        for config, site in zip(configs, sites, strict=True)
    ]
    head = {"format": f"fasttc-{kind}", "schema_version": SCHEMA_VERSION}
    write_json(folder / CONFIG_NAME, {**head, "metadata": metadata, "layers": layers})


def _header(path: Path) -> dict[str, Any]:
    content = read_json(path / CONFIG_NAME)
    if not isinstance(content, dict) or not str(content.get("format")).startswith("fasttc-"):
        raise ValueError(f"expected a fasttc transcoder set, {path / CONFIG_NAME} describes something else")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: expected schema version {SCHEMA_VERSION}, got {version!r}; update fasttc to read it"
        )
    return content


def read_native(
    path: Path, member: type[Transcoder] = Transcoder
) -> tuple[list[Loader], list[Site], dict[str, Any]]:
    """Reads the header of a native folder; weights are read by the returned loaders, as objects of ``member``."""
    content = _header(path)
    loaders, sites = [], []
    for number, entry in enumerate(content.get("layers", [])):
        if not isinstance(entry, dict) or not entry.keys() >= {"file", "site", "config"}:
            raise ValueError(
                f"{path / CONFIG_NAME}: layer {number}: expected file, site and config, got {entry}"
            )
        config, file = TranscoderConfig.from_dict(entry["config"]), path / entry["file"]
        loaders.append(lambda config=config, file=file: read_layer(file, config, member))
        sites.append(Site.from_dict(entry["site"]))
    return loaders, sites, content.get("metadata", {})


def read_set(
    path: Path, kind: Kind = "transcoders", member: type[Transcoder] = Transcoder
) -> tuple[list[Loader], list[Site], dict[str, Any]]:
    """Reads a folder in any known format.

    Raises:
        ValueError: not a folder, a folder of no known format, or a set of another kind.
    """
    name, found = format_of(path), kind_of(path)
    if found != kind:
        raise ValueError(f"expected a set of {kind}, {path} holds {found}")
    return read_native(path, member) if name == "fasttc" else _readers[name][1](path)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; a missing or damaged file is a ``ValueError`` that names it."""
    try:
        with safe_open(file, framework="pt") as source:
            return {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"expected a safetensors file, cannot read {file}: {error}") from error


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file whose header has been read."""
    with safe_open(file, framework="pt") as source:
        return source.get_tensor(name)


def read_layer(file: Path, config: TranscoderConfig, member: type[Transcoder] = Transcoder) -> Transcoder:
    """One transcoder of a native folder, in the dtype it was saved in."""
    return build(config, read_tensors(file), str(file), member)


def build(
    config: TranscoderConfig, tensors: dict[str, Tensor], source: str, member: type[Transcoder] = Transcoder
) -> Transcoder:
    """A transcoder from canonical tensors, each checked: none missing, none extra, shapes right, no NaN.

    Raises:
        ValueError: with ``source``, the tensor and what was expected.
    """
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {name} expected a float tensor, got {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{source}: {name} expected finite numbers, it holds NaN or infinity")
    transcoder = _skeleton(config, tensors["W_enc"].dtype, member)
    # Memory of its own: aligned as PyTorch aligns it, since products may round differently where it is not, and
    # independent of the file.
    transcoder.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return transcoder


def check_shapes(config: TranscoderConfig, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Fails with a ``ValueError`` unless ``shapes`` are those of a transcoder's canonical tensors, by name."""
    expected = {name: tuple(tensor.shape) for name, tensor in _skeleton(config).state_dict().items()}
    missing, extra = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    if missing or extra:
        raise ValueError(f"{source}: missing tensors {sorted(missing)}, unexpected tensors {sorted(extra)}")
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise ValueError(f"{source}: {name} expected shape {list(expected[name])}, got {list(shape)}")


def _skeleton(
    config: TranscoderConfig, dtype: torch.dtype | None = None, member: type[Transcoder] = Transcoder
) -> Transcoder:
    """A transcoder without storage."""
    with torch.device("meta"):
        return member.from_config(config, dtype=dtype)
