"""Training: data streams, and one loop for transcoders from scratch, FTFA fine-tuning and PAT adaptation."""

from fasttc.training.adapt import AdaptOptions as AdaptOptions
from fasttc.training.adapt import adapt as adapt
from fasttc.training.adapter import AdapterOptions as AdapterOptions
from fasttc.training.adapter import AdapterReport as AdapterReport
from fasttc.training.adapter import train_adapters as train_adapters
from fasttc.training.data import TokenData as TokenData
from fasttc.training.data import open_data as open_data
from fasttc.training.distributed import ProcessLost as ProcessLost
from fasttc.training.finetune import FinetuneOptions as FinetuneOptions
from fasttc.training.finetune import FinetuneReport as FinetuneReport
from fasttc.training.finetune import finetune as finetune
from fasttc.training.finetune import finetune_ffn as finetune_ffn
from fasttc.training.loop import Progress as Progress
from fasttc.training.report import TranscoderReport as TranscoderReport
from fasttc.training.scratch import ScratchOptions as ScratchOptions
from fasttc.training.scratch import train as train
from fasttc.training.sharded import ShardedTranscoder as ShardedTranscoder
from fasttc.training.stopping import Diverged as Diverged
from fasttc.training.stopping import Interrupted as Interrupted

__all__ = [
    "AdaptOptions",
    "AdapterOptions",
    "AdapterReport",
    "Diverged",
    "FinetuneOptions",
    "FinetuneReport",
    "Interrupted",
    "ProcessLost",
    "Progress",
    "ScratchOptions",
    "ShardedTranscoder",
    "TokenData",
    "TranscoderReport",
    "adapt",
    "finetune",
    "finetune_ffn",
    "open_data",
    "train",
    "train_adapters",
]
