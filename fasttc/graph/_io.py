"""Graphs on disk: one safetensors file whose metadata holds a JSON header with a schema version.

The header is the only metadata entry: safetensors writes several in random order, and equal graphs shall be equal
files.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from fasttc._files import atomic_file

if TYPE_CHECKING:
    from fasttc.graph.graph import Graph

FORMAT = "fasttc.graph"
SCHEMA_VERSION = 1
GRAPH_TENSORS = (
    "features", "activations", "input_ids", "logit_ids", "logit_probs", "row_ptr", "columns", "values", "remainder",
)  # fmt: skip
PRUNED_TENSORS = ("node_mask", "influence", "cumulative")  # present in pruned graphs only
_HEADER = ("n_layers", "tokens", "logit_labels", "prompt", "metadata")


def tensors_of(graph: "Graph") -> dict[str, Tensor]:
    return {name: getattr(graph, name) for name in GRAPH_TENSORS}


def header_of(graph: "Graph") -> dict[str, Any]:
    return {name: getattr(graph, name) for name in _HEADER}


def described(header: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a graph that a header holds."""
    return {name: header[name] for name in _HEADER}


def write(path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes the file under a temporary name and renames it when it is whole."""
    try:
        text = json.dumps({"schema_version": SCHEMA_VERSION, **header}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata: expected what JSON can hold, got {error}") from error
    # Through numpy: the torch side of safetensors refuses tensors that share memory.
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        try:
            save_file(arrays, temporary, metadata={FORMAT: text})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the header of a graph file; ``ValueError`` for any other file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected a graph file, there is no file of that name")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected a graph file (safetensors), got something else: {error}"
        ) from error
    if FORMAT not in about:
        raise ValueError(f"{path}: expected a graph file, got a safetensors file of another kind")
    header = _header(path, about[FORMAT])
    missing = [name for name in GRAPH_TENSORS if name not in tensors]
    if isinstance(header.get("pruned"), dict):
        missing += [name for name in PRUNED_TENSORS if name not in tensors]
    if missing:
        raise ValueError(f"{path}: broken graph file: missing tensors: {', '.join(missing)}")
    return tensors, header


def _header(path: str | Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: broken graph file: expected a JSON header, got {error}") from None
    version = header.get("schema_version") if isinstance(header, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path}: broken graph file: expected a schema version, got none")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path}: written with graph schema {version}, this fasttc reads up to {SCHEMA_VERSION}: update fasttc"
        )
    missing = [name for name in _HEADER if name not in header]
    if missing:
        raise ValueError(f"{path}: broken graph file: missing in the header: {', '.join(missing)}")
    return header
