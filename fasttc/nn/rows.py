"""Safetensors files that several processes write together, each some rows: for tensors that none of them holds whole.

The format: 8 bytes with the length of the header (little-endian), the header as JSON, then the tensors, row after row.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def reserve(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file of these names, shapes and float dtypes, filled with zeros; tensors may be on the meta device."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)


def write_rows(file: Path, name: str, rows: Tensor, first: int = 0) -> None:
    """Puts rows of a tensor in their place in a reserved file, from row ``first`` on."""
    if not rows.numel():
        return
    data = rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    with file.open("r+b") as out:
        (length,) = struct.unpack("<Q", out.read(8))
        start = json.loads(out.read(length))[name]["data_offsets"][0]
        width = rows[0].numel() * rows.element_size() if first else 0
        out.seek(8 + length + start + first * width)
        out.write(data)
