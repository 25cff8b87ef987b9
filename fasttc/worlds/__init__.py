"""Worlds: generators of text with planted causes, so that explanations can be checked against the truth."""

from fasttc.worlds.clinical import ClinicalWorld as ClinicalWorld
from fasttc.worlds.clinical import Prompt as Prompt
from fasttc.worlds.recipe import CLINICAL_MODEL as CLINICAL_MODEL

__all__ = ["CLINICAL_MODEL", "ClinicalWorld", "Prompt"]
