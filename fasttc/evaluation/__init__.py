"""How good transcoders are: fit, sparsity, what replacing MLPs by them costs, and how far they moved from a base."""

from fasttc.evaluation.evaluator import evaluate as evaluate
from fasttc.evaluation.report import FeatureReport as FeatureReport
from fasttc.evaluation.report import LayerReport as LayerReport
from fasttc.evaluation.report import Report as Report

__all__ = ["FeatureReport", "LayerReport", "Report", "evaluate"]
