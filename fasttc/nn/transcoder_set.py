"""TranscoderSet: one transcoder per layer, with the sites they read and write."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from fasttc.nn import io
from fasttc.nn.hub import resolve
from fasttc.nn.site import Site
from fasttc.nn.transcoder import Transcoder


class TranscoderSet:
    """An ordered set of transcoders, loaded layer by layer when they are first used.

    Args:
        transcoders: in ascending layer order.
        sites: one per transcoder.
        metadata: free provenance (model, data, seed, ...), JSON types only; saved with the weights.

    ``len(tcs)``, iteration and ``tcs[i]`` go by position in the set; ``tcs.sites[i].layer`` is the model's layer.
    """

    kind: ClassVar[io.Kind] = "transcoders"
    member: ClassVar[type[Transcoder]] = Transcoder

    def __init__(
        self, transcoders: Sequence[Transcoder], sites: Sequence[Site], metadata: dict[str, Any] | None = None
    ) -> None:
        self._loaders: list[io.Loader | None] = [None] * len(transcoders)
        self._loaded: list[Transcoder | None] = list(transcoders)
        self._placement: dict[str, Any] = {}
        self._check_and_set(list(sites), metadata)

    def _check_and_set(self, sites: list[Site], metadata: dict[str, Any] | None) -> None:
        if len(sites) != len(self._loaded):
            raise ValueError(f"sites: expected one per transcoder ({len(self._loaded)}), got {len(sites)}")
        if not sites:
            raise ValueError("transcoders: expected at least one, got an empty set")
        layers = [site.layer for site in sites]
        if layers != sorted(set(layers)):
            raise ValueError(f"sites: expected ascending layers without repetition, got {layers}")
        self.sites = sites
        self.metadata = dict(metadata or {})

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lazy: bool = True,
    ) -> Self:
        """Reads a set from a folder, or from the hub as ``user/repo[/subfolder][@revision]``.

        Args:
            path: folder or hub reference, in any registered format.
            device, dtype: where and as what the weights are held; as saved when None.
            lazy: reads each layer's weights on first use; False reads all now.

        Raises:
            ValueError: no such folder, unknown format, a set of another kind, or (when a layer is read) tensors that
                are missing, unexpected, of the wrong shape or not finite.
        """
        loaders, sites, metadata = io.read_set(resolve(path), cls.kind, cls.member)
        tcs = cls.__new__(cls)
        tcs._loaders = list(loaders)
        tcs._loaded = [None] * len(loaders)
        tcs._placement = {"device": device, "dtype": dtype}
        tcs._check_and_set(sites, metadata)
        if not lazy:
            list(tcs)
        return tcs

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the set in the native format. Atomic: an interrupted save leaves the old folder as it was."""
        io.write_set(path, list(self), self.sites, self.metadata, self.kind)

    @property
    def layers(self) -> list[int]:
        return [site.layer for site in self.sites]

    def __len__(self) -> int:
        return len(self._loaded)

    def __getitem__(self, index: int) -> Transcoder:
        transcoder = self._loaded[index]
        if transcoder is None:
            loader = self._loaders[index]
            assert loader is not None, "a transcoder that is not loaded has a loader"
            placement = {key: value for key, value in self._placement.items() if value is not None}
            transcoder = self._loaded[index] = loader().to(**placement).eval()
        return transcoder

    def __iter__(self) -> Iterator[Transcoder]:
        return (self[index] for index in range(len(self)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves the loaded layers in place and every later one as it is read; returns the set itself."""
        change = {"device": device, "dtype": dtype}
        self._placement.update({key: value for key, value in change.items() if value is not None})
        for transcoder in self._loaded:
            if transcoder is not None:
                transcoder.to(**{key: value for key, value in change.items() if value is not None})
        return self

    def __repr__(self) -> str:
        first, last = self.sites[0], self.sites[-1]
        return (
            f"{type(self).__name__}({len(self)} layers {first.layer}..{last.layer}, {first.x} -> {first.y})"
        )
