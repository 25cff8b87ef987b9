"""How near a hybrid, with or without adapters, is to the fine-tuned model, over a stream of blocks."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttc.nn import AdapterSet, TranscoderAdapter
from fasttc.training.bridging import Comparison, Reference
from fasttc.training.packing import TokenBatch


@dataclass(frozen=True)
class AdapterQuality:
    """A hybrid against its target on held-out tokens.

    Attributes:
        kl: ``mean_t KL(p_target || p_hybrid)``, nats.
        top1_error: share of predictions whose most probable token is another.
        nmse: ``sum_t ||h_t - h*_t||^2 / sum_t ||h*_t||^2`` of each of L + 1 residuals; the first is the embeddings.
        l0: mean active features per token, for each layer; empty without adapters.
        dead: share of features that were never active, for each layer; empty without adapters.
        tokens: positions that NMSE and L0 are taken over.
        predictions: positions that KL and top-1 error are taken over.
    """

    kl: float
    top1_error: float
    nmse: list[float]
    l0: list[float]
    dead: list[float]
    tokens: int
    predictions: int

    @property
    def mean_l0(self) -> float:
        """Over layers; 0 without adapters."""
        return sum(self.l0) / len(self.l0) if self.l0 else 0.0

    def kl_recovered(self, hybrid: "AdapterQuality") -> float:
        """Share of the KL of ``hybrid``, the same without adapters, that is taken away; NaN where it has none."""
        return 1 - self.kl / hybrid.kl if hybrid.kl > 0 else float("nan")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean_l0": self.mean_l0}


class _Sums:
    """Of one variant, float64 over any number of blocks."""

    def __init__(self, models: Comparison, adapters: AdapterSet | None, layers: list[int] | None) -> None:
        self._models = models
        self._layers = layers
        self._adapters = {} if adapters is None else dict(zip(adapters.layers, adapters, strict=True))
        self._kept: Tensor | None = None
        self._fired = {
            layer: torch.zeros(adapter.n_features, dtype=torch.float64, device=adapter.b_enc.device)
            for layer, adapter in self._adapters.items()
        }
        self._errors = self._squares = 0.0
        self._kl, self._wrong, self._predictions, self._tokens = 0.0, 0, 0, 0

    def add(self, reference: Reference) -> None:
        self._kept = reference.kept
        recorded = {layer: partial(self._contribution, layer, a) for layer, a in self._adapters.items()}
        final = self._models.final(reference, recorded, self._layers)
        self._kl += float(self._models.divergence.kl(final, reference.final))
        self._wrong += self._models.divergence.disagreement(final, reference.final)
        pairs = [
            (h.double(), ref.double())
            for h, ref in zip(self._models.stream(reference.kept), reference.stream, strict=True)
        ]
        self._errors = self._errors + torch.stack([(h - ref).square().sum().cpu() for h, ref in pairs])
        self._squares = self._squares + torch.stack([ref.square().sum().cpu() for _, ref in pairs])
        self._predictions += len(final)
        self._tokens += len(reference.kept)

    def _contribution(self, layer: int, adapter: TranscoderAdapter, x: Tensor) -> Tensor:
        acts = adapter.encode(x.to(adapter.W_enc))
        token, feature, _ = acts.active()
        assert self._kept is not None, "the kept tokens are known before the forward"
        kept = torch.zeros(acts.n_tokens, dtype=torch.float64, device=token.device)
        kept[self._kept.to(token.device)] = 1
        self._fired[layer].index_add_(0, feature, kept[token])
        return adapter.decode(acts).to(x)

    def result(self) -> AdapterQuality:
        if not self._predictions:
            raise ValueError("data: expected documents of at least two tokens, got none")
        fired = [self._fired[layer] for layer in sorted(self._fired)]
        nmse: Any = self._errors / self._squares
        return AdapterQuality(
            kl=self._kl / self._predictions,
            top1_error=self._wrong / self._predictions,
            nmse=nmse.tolist(),
            l0=[float(f.sum()) / self._tokens for f in fired],
            dead=[float((f == 0).double().mean()) for f in fired],
            tokens=self._tokens,
            predictions=self._predictions,
        )


@torch.no_grad()
def measure_hybrids(
    models: Comparison,
    variants: dict[str, tuple[AdapterSet | None, list[int] | None]],
    batches: Iterable[TokenBatch],
) -> dict[str, AdapterQuality]:
    """Every variant (adapters, layers that are hybrid; None: all) against the target, on one pass over the blocks.

    Raises:
        ValueError: blocks without predictions.
    """
    sums = {name: _Sums(models, *variant) for name, variant in variants.items()}
    for batch in batches:
        reference = models.reference(batch)
        for variant in sums.values():
            variant.add(reference)
    return {name: variant.result() for name, variant in sums.items()}
