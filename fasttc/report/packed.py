"""Packed feature files, read: the evidence of all features in a few files, as ``feature_files`` and others write it.

``index.json.gz`` lists ``{"filename", "offsets"}`` per layer, as a list or as an object by layer. The record of feature
``f`` lies at ``offsets[f]`` to ``offsets[f + 1]`` of that file: four bytes little-endian length, then zlib- or
gzip-compressed JSON. An empty record is a feature without evidence.
"""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

INDEX = "index.json.gz"
_MOST_BYTES = 64_000_000  # of the index, or of one feature's JSON, unpacked: more is no evidence but a bomb


class PackedFiles:
    """A folder with an ``index.json.gz``.

    Raises:
        ValueError: the index is broken, or names a file outside the folder; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path / INDEX
        try:
            content = json.loads(_unpacked(index.read_bytes()))
            layers = enumerate(content) if isinstance(content, list) else content.items()
            self._layers = {int(layer): _entry(entry) for layer, entry in layers}
        except (
            OSError,
            zlib.error,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            raise ValueError(
                f"{index}: expected an index of packed feature files, got a broken one: {error!r}"
            ) from error

    def read(self, layer: int, index: int) -> Any:
        """The JSON of a feature, or None if there is no record of it.

        Raises:
            ValueError: the record is broken; the message names the file and the feature.
        """
        name, offsets = self._layers.get(layer, ("", []))
        if index + 1 >= len(offsets) or offsets[index + 1] == offsets[index]:
            return None
        file = self.path / name
        try:
            with file.open("rb") as stream:
                stream.seek(offsets[index])
                record = stream.read(offsets[index + 1] - offsets[index])
            (length,) = struct.unpack("<I", record[:4])
            if length != len(record) - 4:
                raise ValueError(f"expected a record of {length} bytes, got {len(record) - 4}")
            return json.loads(_unpacked(record[4:]))
        except (OSError, struct.error, zlib.error, ValueError, RecursionError) as error:
            raise ValueError(
                f"{file}: expected the record of feature {layer}/{index}, got a broken one: {error!r}"
            ) from error


def _entry(entry: dict[str, Any]) -> tuple[str, list[int]]:
    name, offsets = str(entry["filename"]), [int(offset) for offset in entry["offsets"]]
    if Path(name).name != name:
        raise ValueError(f"expected the plain name of a file, got {name!r}")
    if any(after < before for before, after in zip([0, *offsets], offsets, strict=False)):
        raise ValueError(f"expected rising offsets for {name!r}, got others")
    return name, offsets


def _unpacked(data: bytes) -> bytes:
    whole = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # 32: zlib's or gzip's header, whichever is there
    text = whole.decompress(data, _MOST_BYTES)
    if not whole.eof:
        raise ValueError(f"expected one whole stream of at most {_MOST_BYTES:,} bytes, got another")
    return text
