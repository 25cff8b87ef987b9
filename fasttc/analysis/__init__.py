"""What features stand for and what circuits say, from weights and from a corpus."""

from fasttc.analysis.features import Example as Example
from fasttc.analysis.features import FeatureEvidence as FeatureEvidence
from fasttc.analysis.features import feature_evidence as feature_evidence

__all__ = ["Example", "FeatureEvidence", "feature_evidence"]
