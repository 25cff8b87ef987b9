"""Where rows wait while more are computed: beside the sweep as long as there is room, then out of its way."""

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor


class Shelf(AbstractContextManager["Shelf"]):
    """Takes tensors and keeps what fits in ``limit`` bytes as it is.

    The others leave the device: from a GPU to the host's memory, from the CPU to a temporary file that is mapped into
    memory (read again from the disk where the machine needs the pages for something else).

    Args:
        limit: bytes; None for no limit.

    Attributes:
        away: bytes that had to leave.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit, self.used, self.away = limit, 0, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor, or the same numbers at another place; not to be changed.

        Raises:
            OSError: no room for the file.
        """
        if self.limit is None or self.used + tensor.nbytes <= self.limit:
            self.used += tensor.nbytes
            return tensor
        self.away += tensor.nbytes
        return tensor.cpu() if tensor.is_cuda else self._on_disk(tensor)

    def _on_disk(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return tensor
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fasttc-rows-")
        path = Path(self._folder.name) / str(self.away)
        with path.open("wb") as file:
            file.write(tensor.contiguous().numpy().data)
        return torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(
            tensor.shape
        )

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()  # what is still mapped lives until it is let go
            self._folder = None
