"""What features stand for and what circuits say, from weights and from a corpus; what fine-tuning moved."""

from fasttc.analysis.categories import Category as Category
from fasttc.analysis.categories import ask_command as ask_command
from fasttc.analysis.categories import feature_categories as feature_categories
from fasttc.analysis.categories import judged as judged
from fasttc.analysis.categories import read_features as read_features
from fasttc.analysis.categories import read_labels as read_labels
from fasttc.analysis.features import Example as Example
from fasttc.analysis.features import FeatureEvidence as FeatureEvidence
from fasttc.analysis.features import feature_evidence as feature_evidence

__all__ = [
    "Category",
    "Example",
    "FeatureEvidence",
    "ask_command",
    "feature_categories",
    "feature_evidence",
    "judged",
    "read_features",
    "read_labels",
]
