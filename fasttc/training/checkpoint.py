"""Checkpoints: a folder with safetensors files and one JSON file, written whole or not at all. No pickle.

What is saved is all that the rest of a run depends on: weights, optimiser, step, place in the data, counters of dead
features, random generators. A resumed run therefore ends with the same bits as one that was never stopped, on the
same machine with the same number of threads.

Several processes write one checkpoint together, each a file with its part, on a disk that all of them see. It can be
continued by another number of processes: what belongs to a layer is found by the layer's number, and of what the
features of one layer share out (:data:`SHARE` in its name) every file has some rows; each process reads its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fasttc._files import atomic_folder, read_json, write_json
from fasttc.training.distributed import Processes

SCHEMA_VERSION = 3
SHARE = ".share."
"""In the names of tensors whose rows are shared out over processes, each with :meth:`Processes.share` of all."""
_TENSORS, _VALUES = "state.{}.safetensors", "state.json"


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of some safetensors files, each read when it is asked for: a process reads no more than it needs.

    Args:
        files: whose names do not overlap, except where rows are shared out.
        prefix: of the names; left out of those given here.
        processes: that share out rows now.
    """

    def __init__(self, files: Sequence[Path], prefix: str = "", processes: Processes | None = None) -> None:
        self._files, self._processes = files, processes or Processes()
        self._handles: dict[str, tuple[str, list[Any]]] = {}
        for file in files:
            handle: Any = safe_open(file, "pt")
            for stored in handle.keys():  # noqa: SIM118, not a dict
                if stored.startswith(prefix):
                    self._handles.setdefault(stored.removeprefix(prefix), (stored, []))[1].append(handle)

    def under(self, prefix: str) -> "StoredTensors":
        return StoredTensors(self._files, prefix, self._processes)

    def __getitem__(self, name: str) -> Tensor:
        stored, handles = self._handles[name]
        if SHARE not in stored or not handles[0].get_slice(stored).get_shape():
            return handles[0].get_tensor(stored).clone()
        rows = [handle.get_slice(stored) for handle in handles]
        own = self._processes.share(sum(part.get_shape()[0] for part in rows))
        found, first = [], 0
        for part in rows:
            length = part.get_shape()[0]
            start, stop = max(own.start - first, 0), min(own.stop - first, length)
            if start < stop:
                found.append(part[start:stop])
            first += length
        return torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], values: dict[str, Any], processes: Processes | None = None
) -> None:
    """Writes a checkpoint in place of the one at ``path``, which stays as it was if this fails.

    Args:
        path: folder.
        tensors: of any device; of several processes each gives others.
        values: JSON types; those of the first process are written.
        processes: who all calls this at once.
    """
    processes = processes or Processes()
    with common_folder(path, processes) as folder:
        if processes.first:
            tensors = tensors | {f"rng.{name}": state for name, state in _rng_states().items()}
            head = {"schema_version": SCHEMA_VERSION, "files": processes.size}
            write_json(folder / _VALUES, {**head, **values})
        _save_tensors(folder, processes.rank, tensors)


@contextmanager
def common_folder(path: Path, processes: Processes) -> Iterator[Path]:
    """A folder that all processes write to, on a disk that they all see; it takes the place of ``path`` when all are
    done, or never if one fails."""
    if not processes.first:
        yield Path(processes.broadcast(None))
        processes.gather(None)
        return
    with atomic_folder(path) as folder:
        processes.broadcast(str(folder))
        yield folder
        processes.gather(None)


def _save_tensors(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    # A clone each: safetensors refuses tensors that share memory (tied weights, views of one buffer).
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(copies, folder / _TENSORS.format(rank))


def load_checkpoint(path: Path, processes: Processes | None = None) -> tuple[StoredTensors, dict[str, Any]]:
    """Reads a checkpoint and puts the random generators where they stood.

    Args:
        path: folder.
        processes: that share out rows now; None: this one alone.

    Raises:
        ValueError: no checkpoint there, one of another version, or a damaged one.
    """
    values = read_values(path)
    try:
        files = [path / _TENSORS.format(rank) for rank in range(values["files"])]
        tensors = StoredTensors(files, processes=processes)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"resume: cannot read the checkpoint {path}: {error}") from error
    for name, state in tensors.under("rng.").items():
        _set_rng(name, state)
    return tensors, values


def read_values(path: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint alone.

    Raises:
        ValueError: no checkpoint there, or one of another version.
    """
    if not (path / _VALUES).is_file():
        raise ValueError(f"resume: expected a checkpoint at {path}, found none")
    values = read_json(path / _VALUES)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"resume: expected a checkpoint of schema version {SCHEMA_VERSION}, "
            f"{path} has {values.get('schema_version')!r}"
        )
    return values


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

    For recognising the same model again, not against tampering. Of buffers nothing is used, and of weights that
    accelerate keeps elsewhere (on the meta device) only how many there are.
    """
    total = 0.0
    for i, parameter in enumerate(model.parameters()):
        if parameter.is_meta:
            total += parameter.numel() * (i + 1)
            continue
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
