"""How much of a fine-tuning adapters hold: distance to the target layer by layer, and what they win back of a score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fasttc._files import finite
from fasttc.evaluation.metrics import recovered
from fasttc.models import check_pair, hybrid
from fasttc.nn import AdapterSet
from fasttc.training.adapter_quality import AdapterQuality, measure_hybrids
from fasttc.training.bridging import comparison
from fasttc.training.data import open_data


@dataclass(frozen=True)
class AdapterEvaluation:
    """What :func:`evaluate_adapters` returns.

    Attributes:
        hybrid: base MLPs in the target, no adapters; adapted: with them. Both against the target.
        single_hybrid_kl, single_adapted_kl: KL with one layer alone hybrid, without and with its adapter; one number
            per layer, empty where not measured.
        settings: how it was measured.
    """

    hybrid: AdapterQuality
    adapted: AdapterQuality
    single_hybrid_kl: list[float]
    single_adapted_kl: list[float]
    settings: dict[str, Any]

    @property
    def kl_recovered(self) -> float:
        """Share of the hybrid's KL that the adapters take away."""
        return self.adapted.kl_recovered(self.hybrid)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; None for a number that is not finite."""
        qualities = {name: getattr(self, name).to_dict() for name in ("hybrid", "adapted")}
        return finite({**asdict(self), **qualities, "kl_recovered": self.kl_recovered})


def evaluate_adapters(
    target: nn.Module,
    base: nn.Module,
    adapters: AdapterSet,
    data: Any,
    *,
    tokenizer: Any = None,
    text: str | None = None,
    split: str = "test",
    tokens: int | None = 32_768,
    batch_size: int = 8,
    context: int = 128,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    split_seed: int = 0,
    per_layer: bool = True,
) -> AdapterEvaluation:
    """Measures the hybrid of target and base, without and with adapters, against the target on held-out text.

    Args:
        target: the fine-tuned model; base: the one it came from. Neither is changed.
        adapters: of all layers.
        data, tokenizer, text, context, fractions, split_seed: see :func:`fasttc.training.data.open_data`.
        split: "train", "validation" or "test".
        tokens: stops after about so many; None: the whole split.
        batch_size: rows of ``context`` tokens in one forward.
        per_layer: measures also every layer alone (two forwards more per layer).

    Raises:
        ValueError: models or adapters that do not fit, or data without predictions.
    """
    parts, _ = check_pair(target, base)
    opened = open_data(
        target, data, tokenizer, text=text, context=context, fractions=fractions, split_seed=split_seed
    )
    variants: dict[str, tuple[AdapterSet | None, list[int] | None]] = {
        "hybrid": (None, None),
        "adapted": (adapters, None),
    }
    layers = range(parts.n_layers) if per_layer else range(0)
    for layer in layers:
        variants |= {f"hybrid {layer}": (None, [layer]), f"adapted {layer}": (adapters, [layer])}
    with comparison(target, base) as models:
        found = measure_hybrids(models, variants, opened.batches(split, batch_size, max_tokens=tokens))
    settings = {
        "data": opened.fingerprint,
        "split": split,
        "context": opened.context,
        "batch_size": batch_size,
    }
    return AdapterEvaluation(
        found["hybrid"],
        found["adapted"],
        [found[f"hybrid {layer}"].kl for layer in layers],
        [found[f"adapted {layer}"].kl for layer in layers],
        settings,
    )


@dataclass(frozen=True)
class Recovery:
    """A score of the target, of the hybrid and of the adapted hybrid, and the share of the gap that is won back."""

    target: float
    hybrid: float
    adapted: float

    @property
    def recovered(self) -> float:
        """``(adapted - hybrid) / (target - hybrid)``; NaN where there is no gap."""
        return recovered(self.target, self.adapted, self.hybrid)

    def to_dict(self) -> dict[str, float | None]:
        """JSON types only; None for a number that is not finite."""
        return finite({**asdict(self), "recovered": self.recovered})


@torch.no_grad()
def recovery(
    target: nn.Module,
    base: nn.Module,
    adapters: AdapterSet,
    scores: Callable[[nn.Module], Mapping[str, float]],
) -> dict[str, Recovery]:
    """Any scores that can be had from a model, by name: accuracy on a task, length of responses, rate of a word.

    Args:
        target, base, adapters: see :func:`fasttc.models.hybrid`.
        scores: called with the target as it is, as hybrid, and as adapted hybrid; the same names each time.
    """
    own = scores(target)
    with hybrid(target, base):
        without = scores(target)
    with hybrid(target, base, adapters):
        found = scores(target)
    return {name: Recovery(float(own[name]), float(without[name]), float(found[name])) for name in own}
