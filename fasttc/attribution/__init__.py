"""Attribution graphs: which features, errors and tokens cause what, in the local replacement model of a prompt.

And interventions: what changing features does in the true model.
"""

from fasttc.attribution.attribute import attribute as attribute
from fasttc.attribution.attribute import attribute_many as attribute_many
from fasttc.attribution.effect import Effect as Effect
from fasttc.attribution.effect import FeatureChange as FeatureChange
from fasttc.attribution.effect import TokenChange as TokenChange
from fasttc.attribution.heads import HeadSplit as HeadSplit
from fasttc.attribution.heads import split_by_head as split_by_head
from fasttc.attribution.intervene import intervene as intervene
from fasttc.attribution.intervene import intervened as intervened
from fasttc.attribution.intervention import Intervention as Intervention
from fasttc.attribution.intervention import negated as negated
from fasttc.attribution.intervention import random_control as random_control
from fasttc.attribution.targets import Direction as Direction
from fasttc.attribution.targets import Feature as Feature
from fasttc.attribution.targets import Logit as Logit
from fasttc.attribution.targets import LogitDifference as LogitDifference

__all__ = [
    "Direction",
    "Effect",
    "Feature",
    "FeatureChange",
    "HeadSplit",
    "Intervention",
    "Logit",
    "LogitDifference",
    "TokenChange",
    "attribute",
    "attribute_many",
    "intervene",
    "intervened",
    "negated",
    "random_control",
    "split_by_head",
]
