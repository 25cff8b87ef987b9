"""Language models: where their parts are, what flows through them, and how MLPs are replaced.

The only layer that imports transformers and interp-engine, and only inside functions.
"""

from fasttc.models.anatomy import Anatomy as Anatomy
from fasttc.models.anatomy import LayerAnatomy as LayerAnatomy
from fasttc.models.anatomy import anatomy as anatomy
from fasttc.models.anatomy import unwrap as unwrap
from fasttc.models.families import FAMILIES as FAMILIES
from fasttc.models.norms import normalized as normalized
from fasttc.models.precision import float64_exact as float64_exact

__all__ = ["FAMILIES", "Anatomy", "LayerAnatomy", "anatomy", "float64_exact", "normalized", "unwrap"]
