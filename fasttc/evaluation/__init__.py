"""How good transcoders are: fit, sparsity, what replacing MLPs by them costs, and how far they moved from a base."""

from fasttc.evaluation.carry_over import LayerCarryOver as LayerCarryOver
from fasttc.evaluation.carry_over import carry_over as carry_over
from fasttc.evaluation.evaluator import evaluate as evaluate
from fasttc.evaluation.report import FeatureReport as FeatureReport
from fasttc.evaluation.report import LayerReport as LayerReport
from fasttc.evaluation.report import Report as Report

__all__ = ["FeatureReport", "LayerCarryOver", "LayerReport", "Report", "carry_over", "evaluate"]
