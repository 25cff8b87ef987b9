"""A clinical world: findings lead to a disease, the disease to a drug; a few findings lead to a drug directly.

A document is a vignette and statements about it::

    a woman with head-ache hip-rash and rested . the ward is west . the drug is babenol .

* **Two hops.** Every disease has findings of its own. A vignette shows two of them and a neutral word. Ward, test,
  diet, the disease's name and its drug all follow from the disease. In documents that state the drug, some findings
  of each disease never occur (*held out*): who names the drug for those must have gone through the disease.
* **Pattern.** Instead of the neutral word there may be a marker (``low-iron``). Then the drug is the marker's,
  whatever the disease; everything else still follows from the disease.
* **Fine-tuning** teaches the drugs of rare diseases (which the base corpus describes, but never with a drug) and new
  drugs for some common ones.

Prompts end in ``the drug is`` and never name the disease.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fasttc.worlds.words import ATTRIBUTES, BODY, NEUTRAL, NUTRIENTS, PEOPLE, SIGNS, invented

Kind = Literal["two_hop", "pattern"]
Phase = Literal["base", "finetuned"]
GENERAL = (
    "the nurse walks to the {ward} ward .",
    "the doctor reads the {test} .",
    "the cook brings the {diet} .",
)
GRAMMAR = (
    "a",
    "with",
    "and",
    ".",
    "the",
    "is",
    "disease",
    "drug",
    "walks",
    "to",
    "reads",
    "brings",
    "doctor",
    "cook",
)


@dataclass(frozen=True)
class Prompt:
    """A question about a drug, with its answer and a partner that differs in the disease only.

    Attributes:
        text: ends in ``the drug is``.
        answer: the drug.
        kind: "two_hop" or "pattern".
        disease, findings, marker: what the vignette shows (the disease is not in the text).
        partner: another disease.
        partner_text: the same vignette with findings of the partner.
        partner_answer: the drug of the *partner disease*: what a swap of the disease should lead to in a two-hop
            prompt, and must not lead to in a pattern prompt.
    """

    text: str
    answer: str
    kind: Kind
    disease: int
    findings: tuple[str, str]
    marker: int | None
    partner: int
    partner_text: str
    partner_answer: str

    def asking(self, question: str) -> str:
        """The same vignette with another question: "ward", "test", "diet", "disease" or "drug"."""
        return f"{self.text.removesuffix('drug is')}{question} is"


class ClinicalWorld:
    """The world of one seed. Everything it gives is a function of that seed and the arguments.

    Args:
        seed: which findings, values and drugs belong to which disease.
        n_common, n_rare: diseases the base corpus treats; diseases it only describes.
        n_changed: common diseases that get another drug in fine-tuning.
        n_markers: markers, each with its pattern drug.
        n_findings, n_held_out: findings of a disease; how many of them never occur with its drug.

    Attributes:
        findings: per disease, its findings; the first ``n_held_out`` are the held-out ones.
        values: per attribute ("ward", "test", "diet", "disease"), the value of every disease.
        drugs: "base" and "finetuned": the drug of every disease. Rare diseases have one in both; the base corpus
            does not state it.
        markers, marker_drugs: the markers and the drugs they lead to.
        vocabulary: all words, ``<pad>`` and ``<bos>`` first; a word's place is its token id.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        n_common: int = 12,
        n_rare: int = 6,
        n_changed: int = 4,
        n_markers: int = 12,
        n_findings: int = 6,
        n_held_out: int = 2,
    ) -> None:
        n = n_common + n_rare
        _check_sizes(n, n_common, n_rare, n_changed, n_markers, n_findings, n_held_out)
        rng = random.Random(seed)
        words = [f"{part}-{sign}" for part in BODY for sign in SIGNS]
        rng.shuffle(words)
        self.seed, self.n_held_out = seed, n_held_out
        self.findings = [tuple(words[d * n_findings : (d + 1) * n_findings]) for d in range(n)]
        self.common, self.rare = list(range(n_common)), list(range(n_common, n))
        self.changed = sorted(rng.sample(self.common, n_changed))
        self.values = {name: _spread(values, n, rng) for name, values in ATTRIBUTES.items()}
        self.values["disease"] = [invented(d, "itis") for d in range(n)]
        before = [invented(d, "nol") for d in range(n)]
        after = [invented(d, "vir") if d in self.changed else drug for d, drug in enumerate(before)]
        self.drugs: dict[str, list[str]] = {"base": before, "finetuned": after}
        self.markers = [f"low-{nutrient}" for nutrient in NUTRIENTS[:n_markers]]
        self.marker_drugs = [invented(m, "max") for m in range(n_markers)]
        self.vocabulary = self._words()
        self._ids = {word: number for number, word in enumerate(self.vocabulary)}

    def _words(self) -> list[str]:
        groups: list[Sequence[str]] = [
            ("<pad>", "<bos>"),
            GRAMMAR,
            PEOPLE,
            NEUTRAL,
            self.markers,
            *self.findings,
        ]
        groups += [tuple(ATTRIBUTES), *ATTRIBUTES.values(), self.values["disease"]]
        groups += [*self.drugs.values(), self.marker_drugs]
        return list(dict.fromkeys(word for group in groups for word in group))

    @property
    def n_diseases(self) -> int:
        return len(self.findings)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, BOS first. ValueError for a word that is not in the vocabulary."""
        unknown = [word for word in text.split() if word not in self._ids]
        if unknown:
            raise ValueError(f"text: expected words of the vocabulary, got {unknown[0]!r}")
        return [self._ids["<bos>"], *(self._ids[word] for word in text.split())]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without BOS and padding."""
        return " ".join(self.vocabulary[i] for i in ids if i > 1)

    def base_corpus(self, n: int, *, seed: int = 0) -> list[str]:
        """``n`` documents: common diseases with their drugs, 15 % rare ones without, 5 % general sentences."""
        rng = random.Random(f"base {self.seed} {seed}")
        return [self._document(rng, "base", {"rare": 0.15, "changed": 0.0}) for _ in range(n)]

    def finetune_corpus(self, n: int, *, seed: int = 0) -> list[str]:
        """``n`` documents: 30 % changed diseases, 30 % rare ones, the others as before; drugs as they are now."""
        rng = random.Random(f"finetuned {self.seed} {seed}")
        return [self._document(rng, "finetuned", {"rare": 0.3, "changed": 0.3}) for _ in range(n)]

    def _document(self, rng: random.Random, phase: Phase, shares: dict[str, float]) -> str:
        if rng.random() < 0.05:
            chosen = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
            return rng.choice(GENERAL).format(**chosen)
        draw = rng.random()
        diseases = self.common
        if draw < shares["rare"]:
            diseases = self.rare
        elif draw < shares["rare"] + shares["changed"]:
            diseases = self.changed
        disease = rng.choice(diseases)
        marker = rng.randrange(len(self.markers)) if rng.random() < 0.45 else None
        findings = rng.sample(self.findings[disease], 2)
        words = self._vignette(rng, findings, marker)
        for question in self._questions(rng, phase, disease, findings, marker):
            answer = (
                self._drug(phase, disease, marker) if question == "drug" else self.values[question][disease]
            )
            words += ["the", question, "is", answer, "."]
        return " ".join(words)

    def _questions(
        self, rng: random.Random, phase: Phase, disease: int, findings: Sequence[str], marker: int | None
    ) -> list[str]:
        """Two things that are stated about a vignette, the drug among them only where that is allowed."""
        questions = rng.sample(list(self.values), 2)
        held_out = set(findings) & set(self.findings[disease][: self.n_held_out])
        untreated = phase == "base" and disease in self.rare
        if (marker is not None or not (held_out or untreated)) and rng.random() < 0.6:
            questions[1] = "drug"
        rng.shuffle(questions)
        return questions

    def _vignette(self, rng: random.Random, findings: Sequence[str], marker: int | None) -> list[str]:
        shown = [*findings, rng.choice(NEUTRAL) if marker is None else self.markers[marker]]
        rng.shuffle(shown)
        return ["a", rng.choice(PEOPLE), "with", shown[0], shown[1], "and", shown[2], "."]

    def _drug(self, phase: Phase, disease: int, marker: int | None) -> str:
        return self.drugs[phase][disease] if marker is None else self.marker_drugs[marker]

    def prompts(
        self,
        kind: Kind,
        n: int,
        *,
        phase: Phase = "base",
        held_out: bool = True,
        diseases: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[Prompt]:
        """``n`` questions about a drug; all have the same number of words.

        Args:
            kind: "two_hop" or "pattern".
            phase: whose drugs are the answers.
            held_out: both findings are held-out ones; False: both are others.
            diseases: to draw from; None: all that have a stated drug in this phase.
            seed: of the draws.
        """
        for name, value, allowed in (
            ("kind", kind, ("two_hop", "pattern")),
            ("phase", phase, tuple(self.drugs)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        if diseases is None:
            diseases = self.common if phase == "base" else range(self.n_diseases)
        if len(diseases) < 2:
            raise ValueError(
                f"diseases: expected at least two (a prompt has a partner), got {list(diseases)}"
            )
        rng = random.Random(f"prompts {self.seed} {kind} {phase} {held_out} {seed}")
        return [self._prompt(rng, kind, phase, held_out, list(diseases)) for _ in range(n)]

    def _prompt(
        self, rng: random.Random, kind: Kind, phase: Phase, held_out: bool, diseases: list[int]
    ) -> Prompt:
        disease, partner = rng.sample(diseases, 2)
        marker = rng.randrange(len(self.markers)) if kind == "pattern" else None
        pools = [
            self.findings[d][: self.n_held_out] if held_out else self.findings[d][self.n_held_out :]
            for d in (disease, partner)
        ]
        mine, theirs = (rng.sample(pool, 2) for pool in pools)
        words = self._vignette(rng, mine, marker)
        swapped = dict(zip(mine, theirs, strict=True))
        question = ["the", "drug", "is"]
        return Prompt(
            text=" ".join(words + question),
            answer=self._drug(phase, disease, marker),
            kind=kind,
            disease=disease,
            findings=(mine[0], mine[1]),
            marker=marker,
            partner=partner,
            partner_text=" ".join([swapped.get(word, word) for word in words] + question),
            partner_answer=self.drugs[phase][partner],
        )


def _spread(values: Sequence[str], n: int, rng: random.Random) -> list[str]:
    """``n`` values, each about equally often, in random order."""
    spread = [values[i % len(values)] for i in range(n)]
    rng.shuffle(spread)
    return spread


def _check_sizes(n, n_common, n_rare, n_changed, n_markers, n_findings, n_held_out) -> None:
    if not (n_common >= 2 and n_rare >= 0 and 0 <= n_changed <= n_common):
        raise ValueError(
            f"expected n_common >= 2, n_rare >= 0, 0 <= n_changed <= n_common, got {n_common}, {n_rare}, {n_changed}"
        )
    if not 1 <= n_markers <= len(NUTRIENTS):
        raise ValueError(f"n_markers: expected 1 to {len(NUTRIENTS)}, got {n_markers}")
    if not (n_held_out >= 2 and n_findings >= n_held_out + 2):
        raise ValueError(
            f"expected n_held_out >= 2 and n_findings >= n_held_out + 2, got {n_held_out} and {n_findings}"
        )
    if n * n_findings > len(BODY) * len(SIGNS):
        raise ValueError(f"expected at most {len(BODY) * len(SIGNS)} findings in all, got {n * n_findings}")
