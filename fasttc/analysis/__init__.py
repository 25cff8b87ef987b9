"""What features stand for and what circuits say, from weights and from a corpus; what fine-tuning moved."""

from fasttc.analysis.categories import Category as Category
from fasttc.analysis.categories import ask_command as ask_command
from fasttc.analysis.categories import feature_categories as feature_categories
from fasttc.analysis.categories import judged as judged
from fasttc.analysis.categories import read_features as read_features
from fasttc.analysis.categories import read_labels as read_labels
from fasttc.analysis.coactivation import feature_activations as feature_activations
from fasttc.analysis.features import Example as Example
from fasttc.analysis.features import FeatureEvidence as FeatureEvidence
from fasttc.analysis.features import feature_evidence as feature_evidence
from fasttc.analysis.shift import ClassShift as ClassShift
from fasttc.analysis.shift import LayerShift as LayerShift
from fasttc.analysis.shift import ShiftReport as ShiftReport
from fasttc.analysis.shift import read_classes as read_classes
from fasttc.analysis.shift import representation_shift as representation_shift

__all__ = [
    "Category",
    "ClassShift",
    "Example",
    "FeatureEvidence",
    "LayerShift",
    "ShiftReport",
    "ask_command",
    "feature_activations",
    "feature_categories",
    "feature_evidence",
    "judged",
    "read_classes",
    "read_features",
    "read_labels",
    "representation_shift",
]
