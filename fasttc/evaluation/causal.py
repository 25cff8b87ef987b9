"""Is a concept in the model, or only in the data? Swap its representation and see whether the answer follows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttc.models import anatomy
from fasttc.worlds import ClinicalWorld, Prompt


@dataclass(frozen=True)
class SwapReport:
    """What swapping the disease did.

    Attributes:
        layer: the residual before this layer was changed, at the last position.
        two_hop_accuracy, pattern_accuracy: of the untouched model on the same held-out prompts.
        two_hop_follows: share of two-hop prompts whose answer became the partner disease's drug.
        pattern_changes: share of pattern prompts whose answer became any other than the marker's drug.
        n: prompts of each kind.
    """

    layer: int
    two_hop_accuracy: float
    pattern_accuracy: float
    two_hop_follows: float
    pattern_changes: float
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
    layer: int | None = None,
    seed: int = 0,
) -> SwapReport:
    """Swaps the representation of the disease and counts which answers follow.

    The representation of a disease is the mean residual at the last position (``the drug is``) over vignettes of
    that disease, both kinds in equal numbers, none of them held out. In every held-out prompt the difference
    between the partner's mean and its own is added there, before ``layer``; nothing else is touched. The procedure
    has no free choice but the layer, which is the middle one by default.

    Args:
        model: trained on the world.
        world: the same one.
        phase: "base" or "finetuned": whose drugs are the right answers.
        n: held-out prompts of each kind; twice five times as many for the means.
        layer: 1 to L - 1; None: L / 2.
        seed: of the prompts.
    """
    layer = len(anatomy(model).layers) // 2 if layer is None else layer
    known = [
        p
        for kind in ("two_hop", "pattern")
        for p in world.prompts(kind, 5 * n, phase=phase, held_out=False, seed=seed)
    ]
    residual = _last_residual(model, _ids(world, known, model), layer)
    diseases = torch.tensor([prompt.disease for prompt in known], device=residual.device)
    means = residual.new_zeros(world.n_diseases, residual.shape[1]).index_add_(0, diseases, residual)
    means /= torch.bincount(diseases, minlength=world.n_diseases).clamp(min=1)[:, None]
    found = {}
    for kind in ("two_hop", "pattern"):
        prompts = world.prompts(kind, n, phase=phase, held_out=True, seed=seed)
        ids = _ids(world, prompts, model)
        shift = means[[p.partner for p in prompts]] - means[[p.disease for p in prompts]]
        found[kind] = (prompts, _answers(model, world, ids), _answers(model, world, ids, layer, shift))
    two, before_two, after_two = found["two_hop"]
    pattern, before_pattern, after_pattern = found["pattern"]
    return SwapReport(
        layer=layer,
        two_hop_accuracy=_share(before_two, [p.answer for p in two]),
        pattern_accuracy=_share(before_pattern, [p.answer for p in pattern]),
        two_hop_follows=_share(after_two, [p.partner_answer for p in two]),
        pattern_changes=1 - _share(after_pattern, [p.answer for p in pattern]),
        n=n,
    )


def accuracy(model: nn.Module, world: ClinicalWorld, prompts: Sequence[Prompt]) -> float:
    """Share of prompts whose most probable next word is the right drug."""
    with torch.no_grad():
        return _share(_answers(model, world, _ids(world, prompts, model)), [p.answer for p in prompts])


def _ids(world: ClinicalWorld, prompts: Sequence[Prompt], model: nn.Module) -> Tensor:
    device = next(model.parameters()).device
    return torch.tensor([world.encode(prompt.text) for prompt in prompts], device=device)


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
