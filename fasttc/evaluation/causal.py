"""Is a concept in the model, or only in the data? Swap its representation and see whether the answer follows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttc.models import anatomy
from fasttc.worlds import ClinicalWorld, Prompt
from fasttc.worlds.clinical import Kind

KINDS: tuple[Kind, Kind] = ("two_hop", "pattern")
OTHER_QUESTIONS = ("ward", "test", "diet", "disease")


@dataclass(frozen=True)
class SwapReport:
    """What swapping the disease did.

    Attributes:
        layer: the residual before this layer was changed, at the last position.
        two_hop_accuracy, pattern_accuracy: of the untouched model on the same held-out prompts.
        two_hop_follows: share of two-hop prompts whose answer became the partner disease's drug.
        pattern_changes: share of pattern prompts whose answer became any other than the marker's drug.
        strict_two_hop_follows, strict_pattern_changes: the same with representations taken where no drug is asked
            for.
        n: prompts of each kind.
    """

    layer: int
    two_hop_accuracy: float
    pattern_accuracy: float
    two_hop_follows: float
    pattern_changes: float
    strict_two_hop_follows: float
    strict_pattern_changes: float
    n: int

    @property
    def passed(self) -> bool:
        """At least 80 % of two-hop answers follow, at most 20 % of pattern answers change."""
        return self.two_hop_follows >= 0.8 and self.pattern_changes <= 0.2

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@torch.no_grad()
def disease_swap(
    model: nn.Module,
    world: ClinicalWorld,
    *,
    phase: Any = "base",
    n: int = 400,
    layer: int = 1,
    seed: int = 0,
) -> SwapReport:
    """Swaps the representation of the disease and counts which answers follow.

    The representation of a disease is the mean residual at the last position over vignettes of that disease, both
    kinds in equal numbers, none of them held out. In every held-out prompt (``the drug is``) the difference between
    the partner's mean and its own is added there, before ``layer``; nothing else is touched.

    Where the means come from decides what is shown. Taken at the question for the drug, they hold whatever the model
    has there that depends on the disease. A sceptic may say: that is the drug itself. Against it speaks that pattern
    prompts keep their drug under the same shift, and the *strict* figures: there the means are taken at the questions
    for ward, test, diet and name, so that they can hold no drug. They are lower where the model mixes disease and
    question early; both are reported, the pass mark refers to the first.

    Args:
        model: trained on the world.
        world: the same one.
        phase: "base" or "finetuned": whose drugs are the right answers.
        n: held-out prompts of each kind; the means are over five times as many.
        layer: 1 to L - 1. At 1, the default, attention has brought the disease to the last position once, and every
            other layer still follows.
        seed: of the prompts.
    """
    known = [p for kind in KINDS for p in world.prompts(kind, 5 * n, phase=phase, held_out=False, seed=seed)]
    asked = {kind: world.prompts(kind, n, phase=phase, held_out=True, seed=seed) for kind in KINDS}
    shares = {}
    for name, questions in (("plain", ("drug",)), ("strict", OTHER_QUESTIONS)):
        means = _disease_means(model, world, known, questions, layer)
        for kind, prompts in asked.items():
            shift = means[[p.partner for p in prompts]] - means[[p.disease for p in prompts]]
            said = _answers(model, world, _ids(world, [p.text for p in prompts], model), layer, shift)
            wanted = [p.partner_answer if kind == "two_hop" else p.answer for p in prompts]
            shares[name, kind] = _share(said, wanted)
    return SwapReport(
        layer=layer,
        two_hop_accuracy=accuracy(model, world, asked["two_hop"]),
        pattern_accuracy=accuracy(model, world, asked["pattern"]),
        two_hop_follows=shares["plain", "two_hop"],
        pattern_changes=1 - shares["plain", "pattern"],
        strict_two_hop_follows=shares["strict", "two_hop"],
        strict_pattern_changes=1 - shares["strict", "pattern"],
        n=n,
    )


def _disease_means(
    model: nn.Module, world: ClinicalWorld, prompts: Sequence[Prompt], questions: Sequence[str], layer: int
) -> Tensor:
    """Mean residual before ``layer`` at the last position, by disease, over the prompts with each question: [n, D]."""
    texts = [prompt.asking(question) for question in questions for prompt in prompts]
    residual = _last_residual(model, _ids(world, texts, model), layer)
    diseases = torch.tensor([prompt.disease for prompt in prompts] * len(questions), device=residual.device)
    sums = residual.new_zeros(world.n_diseases, residual.shape[1]).index_add_(0, diseases, residual)
    return sums / torch.bincount(diseases, minlength=world.n_diseases).clamp(min=1)[:, None]


def accuracy(model: nn.Module, world: ClinicalWorld, prompts: Sequence[Prompt]) -> float:
    """Share of prompts whose most probable next word is the right drug."""
    with torch.no_grad():
        return _share(
            _answers(model, world, _ids(world, [p.text for p in prompts], model)), [p.answer for p in prompts]
        )


def _ids(world: ClinicalWorld, texts: Sequence[str], model: nn.Module) -> Tensor:
    return torch.tensor([world.encode(text) for text in texts], device=next(model.parameters()).device)


def _last_residual(model: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """Residual before ``layer`` at the last position, [n, D]."""
    block = model.get_submodule(anatomy(model).layers[layer].block)
    kept: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: kept.append(args[0][:, -1]))
    try:
        for part in ids.split(512):
            model(input_ids=part, use_cache=False)
    finally:
        handle.remove()
    return torch.cat(kept)


def _answers(
    model: nn.Module, world: ClinicalWorld, ids: Tensor, layer: int | None = None, shift: Tensor | None = None
) -> list[str]:
    """Most probable next words, with ``shift [n, D]`` added to the last residual before ``layer`` where given."""

    def add(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        changed = args[0].clone()
        changed[:, -1] += shift
        return (changed, *args[1:])

    handle = None
    if shift is not None and layer is not None:
        handle = model.get_submodule(anatomy(model).layers[layer].block).register_forward_pre_hook(add)
    try:
        best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
    finally:
        if handle is not None:
            handle.remove()
    return [world.vocabulary[i] for i in best.tolist()]


def _share(got: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(got, wanted, strict=True)) / len(got)
