"""What an intervention did: logits, activations and text of the model as it is and of the changed one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fasttc.attribution.intervention import Intervention
from fasttc.ops import SparseActs


class TokenChange(NamedTuple):
    """One next token: its logit and its probability, before and after."""

    token: int
    logit_before: float
    logit_after: float
    prob_before: float
    prob_after: float


class FeatureChange(NamedTuple):
    """One feature at one position: its activation before and after."""

    layer: int
    position: int
    feature: int
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Effect:
    """Two runs of one prompt: of the model as it is ("before") and with interventions ("after").

    Attributes:
        input_ids: ``[T]`` the prompt.
        interventions: what was done.
        layers: of the transcoders.
        logits_before: ``[T, V]`` in the model's dtype, as for ``logits_after``.
        logits_after: see ``logits_before``.
        activations_before: per transcoder, what it reads from the run, ``[T]`` tokens; None if not asked for. After:
            read from the changed stream, but before the layer's own features are changed.
        activations_after: see ``activations_before``.
        generated_before: ``[new]`` tokens that follow the prompt; None if not asked for.
        generated_after: see ``generated_before``.
    """

    input_ids: Tensor
    interventions: Sequence[Intervention]
    layers: Sequence[int]
    logits_before: Tensor
    logits_after: Tensor
    activations_before: Sequence[SparseActs] | None
    activations_after: Sequence[SparseActs] | None
    generated_before: Tensor | None
    generated_after: Tensor | None

    def kl(self, position: int = -1) -> float:
        """``KL(before ‖ after)`` of the next-token distributions at a position, in nats."""
        before, after = self._log_probs(position)
        return float((before.exp() * (before - after)).sum())

    def token_changes(self, n: int = 10, position: int = -1) -> list[TokenChange]:
        """The ``n`` next tokens whose probability changed most, largest change first; ties by token id."""
        before, after = (log_probs.exp() for log_probs in self._log_probs(position))
        order = (after - before).abs().sort(descending=True, stable=True).indices[:n]
        columns = [self.logits_before[position], self.logits_after[position], before, after]
        return [TokenChange(token, *(float(column[token]) for column in columns)) for token in order.tolist()]

    def feature_changes(self, n: int = 10) -> list[FeatureChange]:
        """The ``n`` activations that changed most, largest change first; ties by layer, position and index.

        Raises:
            ValueError: the effect was measured without activations.
        """
        if self.activations_before is None or self.activations_after is None:
            raise ValueError("feature_changes: expected an effect with activations=True, got one without")
        found: list[FeatureChange] = []
        for layer, *runs in zip(self.layers, self.activations_before, self.activations_after, strict=True):
            values: dict[tuple[int, int], list[float]] = {}
            for run, acts in enumerate(runs):
                token, feature, value = acts.active()
                for place in zip(token.tolist(), feature.tolist(), value.tolist(), strict=True):
                    values.setdefault(place[:2], [0.0, 0.0])[run] = place[2]
            found += [FeatureChange(layer, *place, *pair) for place, pair in sorted(values.items())]
        return sorted(found, key=lambda change: -abs(change.after - change.before))[:n]

    def _log_probs(self, position: int) -> tuple[Tensor, Tensor]:
        return tuple(  # pyright: ignore[reportReturnType]
            torch.log_softmax(logits[position].double(), -1)
            for logits in (self.logits_before, self.logits_after)
        )
