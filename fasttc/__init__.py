"""fasttc: sparse transcoders for language models, adapted to fine-tuned models and read as circuits, fast.

Importing this package loads neither Triton nor transformers; names are resolved when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "Transcoder": "fasttc.nn",
    "TranscoderSet": "fasttc.formats",  # the module that also knows every foreign checkpoint format
    "TranscoderAdapter": "fasttc.nn",
    "AdapterSet": "fasttc.formats",
    "SparseActs": "fasttc.ops",
    "Site": "fasttc.nn",
    "Graph": "fasttc.graph",
    "attribute": "fasttc.attribution",
    "Intervention": "fasttc.attribution",
    "intervene": "fasttc.attribution",
    "train": "fasttc.training",
    "finetune_ffn": "fasttc.training",
    "adapt": "fasttc.training",
    "evaluate": "fasttc.evaluation",
    "replaced": "fasttc.models",
    "hybrid": "fasttc.models",
    "capture": "fasttc.models",
}
_SUBPACKAGES = (
    "attribution", "evaluation", "formats", "graph", "models", "nn", "ops", "testing",
    "training", "worlds",
)  # fmt: skip

__all__ = ["__version__", *_HOME, *_SUBPACKAGES]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from fasttc.attribution import Intervention as Intervention
    from fasttc.attribution import attribute as attribute
    from fasttc.attribution import intervene as intervene
    from fasttc.evaluation import evaluate as evaluate
    from fasttc.formats import AdapterSet as AdapterSet
    from fasttc.formats import TranscoderSet as TranscoderSet
    from fasttc.graph import Graph as Graph
    from fasttc.models import capture as capture
    from fasttc.models import hybrid as hybrid
    from fasttc.models import replaced as replaced
    from fasttc.nn import Site as Site
    from fasttc.nn import Transcoder as Transcoder
    from fasttc.nn import TranscoderAdapter as TranscoderAdapter
    from fasttc.ops import SparseActs as SparseActs
    from fasttc.training import adapt as adapt
    from fasttc.training import finetune_ffn as finetune_ffn
    from fasttc.training import train as train


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _SUBPACKAGES:
        return import_module(f"fasttc.{name}")
    raise AttributeError(f"module 'fasttc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
