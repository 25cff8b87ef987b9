"""Checkpoints: a folder with one safetensors file and one JSON file, written whole or not at all. No pickle.

What is saved is all that the rest of a run depends on: weights, optimiser, step, place in the data, counters of dead
features, random generators. A resumed run therefore ends with the same bits as one that was never stopped, on the
same machine with the same number of threads.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasttc._files import atomic_folder, read_json, write_json

SCHEMA_VERSION = 1
_TENSORS, _VALUES = "state.safetensors", "state.json"


def save_checkpoint(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Writes a checkpoint in place of the one at ``path``, which stays as it was if this fails.

    Args:
        path: folder.
        tensors: of any device.
        values: JSON types.
    """
    whole = tensors | {f"rng.{name}": state for name, state in _rng_states().items()}
    with atomic_folder(path) as folder:
        # A clone each: safetensors refuses tensors that share memory (tied weights, views of one buffer).
        save_file(
            {name: t.detach().to("cpu", copy=True).contiguous() for name, t in whole.items()},
            folder / _TENSORS,
        )
        write_json(folder / _VALUES, {"schema_version": SCHEMA_VERSION, **values})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint and puts the random generators where they stood.

    Raises:
        ValueError: no checkpoint there, one of another version, or a damaged one.
    """
    if not (path / _VALUES).is_file():
        raise ValueError(f"resume: expected a checkpoint at {path}, found none")
    values = read_json(path / _VALUES)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"resume: expected a checkpoint of schema version {SCHEMA_VERSION}, "
            f"{path} has {values.get('schema_version')!r}"
        )
    try:
        tensors = load_file(path / _TENSORS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"resume: cannot read the checkpoint {path}: {error}") from error
    for name in [name for name in tensors if name.startswith("rng.")]:
        _set_rng(name.removeprefix("rng."), tensors.pop(name))
    return tensors, values


def check_same(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """ValueError naming every field in which a run differs from the one that wrote the checkpoint."""
    differing = [
        f"{name} (checkpoint {saved.get(name)!r}, now {now.get(name)!r})"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(
            f"resume: the checkpoint {path} belongs to another configuration: {'; '.join(differing)}"
        )


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """A quick check value of a model's weights: a float64 sum over a few hundred of every parameter, as hex.

    For recognising the same model again, not against tampering. Of buffers nothing is used.
    """
    total = 0.0
    for i, parameter in enumerate(model.parameters()):
        flat = parameter.detach().flatten()
        stride = max(1, flat.numel() // 256)
        sampled = flat[::stride].double().cpu()
        total += float((sampled * torch.arange(1, len(sampled) + 1, dtype=torch.float64)).sum()) * (i + 1)
    return total.hex()


def _rng_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_rng(name: str, state: Tensor) -> None:
    if name == "cpu":
        torch.set_rng_state(state)
    elif torch.cuda.is_available() and int(name.removeprefix("cuda.")) < torch.cuda.device_count():
        torch.cuda.set_rng_state(state, int(name.removeprefix("cuda.")))
