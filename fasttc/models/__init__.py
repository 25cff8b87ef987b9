"""Language models: where their parts are, what flows through them, and how MLPs are replaced.

The only layer that imports transformers and interp-engine, and only inside functions.
"""

from fasttc.models._patch import evaluating as evaluating
from fasttc.models.anatomy import Anatomy as Anatomy
from fasttc.models.anatomy import LayerAnatomy as LayerAnatomy
from fasttc.models.anatomy import anatomy as anatomy
from fasttc.models.anatomy import unwrap as unwrap
from fasttc.models.capture import Capture as Capture
from fasttc.models.capture import capture as capture
from fasttc.models.families import FAMILIES as FAMILIES
from fasttc.models.freeze import ffn_parameters as ffn_parameters
from fasttc.models.hold import Held as Held
from fasttc.models.hold import held as held
from fasttc.models.hybrid import adapter_sites as adapter_sites
from fasttc.models.hybrid import check_pair as check_pair
from fasttc.models.hybrid import check_same_tokenizer as check_same_tokenizer
from fasttc.models.hybrid import hybrid as hybrid
from fasttc.models.hybrid import steered as steered
from fasttc.models.load import check_device as check_device
from fasttc.models.load import load as load
from fasttc.models.lora import lora as lora
from fasttc.models.norms import normalized as normalized
from fasttc.models.precision import float64_exact as float64_exact
from fasttc.models.recompute import recomputed as recomputed
from fasttc.models.replace import ablated as ablated
from fasttc.models.replace import overridden as overridden
from fasttc.models.replace import replaced as replaced
from fasttc.models.residuals import residuals as residuals
from fasttc.models.sample import sample as sample
from fasttc.models.sites import bind_sites as bind_sites
from fasttc.models.sites import check_match as check_match
from fasttc.models.sites import default_sites as default_sites
from fasttc.models.vocabulary import embedding_inputs as embedding_inputs
from fasttc.models.vocabulary import logit_directions as logit_directions

__all__ = [
    "FAMILIES",
    "Anatomy",
    "Capture",
    "Held",
    "LayerAnatomy",
    "ablated",
    "adapter_sites",
    "anatomy",
    "bind_sites",
    "capture",
    "check_device",
    "check_match",
    "check_pair",
    "check_same_tokenizer",
    "default_sites",
    "embedding_inputs",
    "evaluating",
    "ffn_parameters",
    "float64_exact",
    "held",
    "hybrid",
    "load",
    "logit_directions",
    "lora",
    "normalized",
    "overridden",
    "recomputed",
    "replaced",
    "residuals",
    "sample",
    "steered",
    "unwrap",
]
