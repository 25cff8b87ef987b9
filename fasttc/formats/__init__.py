"""Checkpoint formats, each one file: importing this package teaches ``from_pretrained`` all of them."""

from pathlib import Path

from fasttc.formats import circuit_tracer, transcoder_adapter
from fasttc.formats._format import Format as Format
from fasttc.nn import AdapterSet as AdapterSet
from fasttc.nn import TranscoderSet as TranscoderSet
from fasttc.nn import io
from fasttc.nn.hub import resolve

__all__ = ["FORMATS", "AdapterSet", "Format", "TranscoderSet", "sniff"]

FORMATS: tuple[Format, ...] = (circuit_tracer.FORMAT, transcoder_adapter.FORMAT)
"""Foreign formats in the order in which they are asked; the native one is asked first."""

for _format in FORMATS:
    io.register_reader(_format.name, _format.recognises, _format.read, _format.kind)


def sniff(path: str | Path) -> str:
    """Name of the format of a folder or hub reference: "fasttc" or one of ``FORMATS``.

    Raises:
        ValueError: no such folder, or none of the known formats.
    """
    return io.format_of(resolve(path))
