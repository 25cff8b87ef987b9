"""Attribution graphs: which features, errors and tokens cause what, in the local replacement model of a prompt."""

from fasttc.attribution.attribute import attribute as attribute
from fasttc.attribution.attribute import attribute_many as attribute_many
from fasttc.attribution.targets import Direction as Direction
from fasttc.attribution.targets import Feature as Feature
from fasttc.attribution.targets import Logit as Logit
from fasttc.attribution.targets import LogitDifference as LogitDifference

__all__ = ["Direction", "Feature", "Logit", "LogitDifference", "attribute", "attribute_many"]
