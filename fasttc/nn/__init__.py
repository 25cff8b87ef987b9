"""Parameters: transcoders and adapters, sets of them, and the sites they are attached to."""

from fasttc.nn.adapter import AdapterSet as AdapterSet
from fasttc.nn.adapter import TranscoderAdapter as TranscoderAdapter
from fasttc.nn.site import Site as Site
from fasttc.nn.transcoder import Transcoder as Transcoder
from fasttc.nn.transcoder import TranscoderConfig as TranscoderConfig
from fasttc.nn.transcoder_set import TranscoderSet as TranscoderSet
from fasttc.ops import SparseActs as SparseActs

__all__ = [
    "AdapterSet",
    "Site",
    "SparseActs",
    "Transcoder",
    "TranscoderAdapter",
    "TranscoderConfig",
    "TranscoderSet",
]
