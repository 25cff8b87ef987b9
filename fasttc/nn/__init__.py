"""Parameters: transcoders, sets of them, and the sites they are attached to."""

from fasttc.nn.site import Site as Site
from fasttc.nn.transcoder import Transcoder as Transcoder
from fasttc.nn.transcoder import TranscoderConfig as TranscoderConfig
from fasttc.nn.transcoder_set import TranscoderSet as TranscoderSet
from fasttc.ops import SparseActs as SparseActs

__all__ = ["Site", "SparseActs", "Transcoder", "TranscoderConfig", "TranscoderSet"]
