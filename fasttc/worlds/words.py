"""The words of the clinical world: readable, one token each, none of them a real disease or drug."""

BODY = (
    "head", "neck", "chest", "back", "knee", "hand", "foot", "eye", "ear", "jaw", "hip", "skin", "throat", "wrist",
    "ankle", "elbow", "scalp", "heel", "thigh", "palm", "rib", "shin", "lip", "brow",
)  # fmt: skip
SIGNS = ("ache", "rash", "spasm", "swelling", "numbness", "itch")
NUTRIENTS = (
    "iron", "zinc", "iodine", "copper", "folate", "calcium", "sodium", "magnesium", "selenium", "potassium", "biotin",
    "niacin", "cobalt", "chrome", "fluoride", "sulfur",
)  # fmt: skip
NEUTRAL = (
    "tall", "short", "calm", "tired", "cheerful", "hungry", "rested", "busy", "quiet", "talkative",
)  # fmt: skip
PEOPLE = ("man", "woman", "child", "nurse")
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")

ATTRIBUTES = {  # what a disease decides besides its drug, and the values it can have
    "ward": ("north", "south", "east", "west", "central"),
    "test": ("scan", "swab", "biopsy", "culture", "smear", "tracing", "titre"),
    "diet": ("broth", "rice", "fruit", "bread"),
}


def invented(number: int, ending: str) -> str:
    """The ``number``-th invented name with an ending: a different pair of syllables for every number below 3000."""
    first, second = number % 65, (number * 7 + number // 65) % 65
    return "".join(_ONSETS[part // 5] + _VOWELS[part % 5] for part in (first, second)) + ending
