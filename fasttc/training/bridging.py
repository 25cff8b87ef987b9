"""The task of training adapters: four losses between a fine-tuned model and the hybrid of it and its base."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fasttc.models import anatomy, evaluating, hybrid, residuals
from fasttc.nn import AdapterSet
from fasttc.training.divergence import Divergence
from fasttc.training.optimiser import Group, Optimiser
from fasttc.training.packing import NO_LABEL, TokenBatch

LOOK_AT_DENSITY = 32
"""Steps between two looks at how many features are active: each look waits for the device."""
DENSE_ABOVE = 1 / 20
"""Share of active features from which dense products are faster (a CPU, F = 256 to 1024, forward and backward)."""


@dataclass(frozen=True)
class AdapterObjective:
    """Weights of the four losses of Hu et al. 2026 (arXiv 2602.20904).

    Attributes:
        adapt: of ``KL(p_target || p_adapted)``, mean over predictions.
        l1: of ``sum_l mean_t sum_i f_ti ||W_dec_i||``, reached after ``l1_ramp`` steps in a straight line from 0.
        l1_ramp: those steps.
        nmse: of ``1/(L+1) sum_l sum_t ||h_lt - h*_lt||^2 / sum_t ||h*_lt||^2`` over the L + 1 residuals.
        bridge: of the divergences of models that are the target up to some layer and adapted from there on, and the
            other way round.
        cutoffs: at how many layers a step switches.
        loss: "kl"; "lm" puts next-token cross-entropy in the place of every KL.
    """

    adapt: float = 1.0
    l1: float = 1e-3
    l1_ramp: int = 0
    nmse: float = 1.0
    bridge: float = 2.0
    cutoffs: int = 1
    loss: Literal["kl", "lm"] = "kl"


@dataclass(frozen=True)
class Reference:
    """What the target does on a block.

    Attributes:
        batch: on the target's device.
        kept: [n] positions, in the flattened block, that NMSE, L1 and L0 are taken over: no padding, no first tokens.
        predicting: [m] positions with a next token.
        stream: L + 1 residuals, [n, D], at ``kept``.
        final: [m, D], outputs of the last norm at ``predicting``.
        labels: [m] next tokens.
    """

    batch: TokenBatch
    kept: Tensor
    predicting: Tensor
    stream: list[Tensor]
    final: Tensor
    labels: Tensor


class Comparison:
    """Runs a target, and its hybrid with a base, on blocks. Made by :func:`comparison`."""

    def __init__(self, target: nn.Module, base: nn.Module, stream: list[Tensor]) -> None:
        parts = anatomy(target)
        self.target, self.base = target, base
        self.n_layers = parts.n_layers
        self.device = next(target.parameters()).device
        self.divergence = Divergence(target)
        self._trunk = target.get_submodule(parts.trunk)
        self._stream = stream

    @torch.no_grad()
    def reference(self, batch: TokenBatch) -> Reference:
        """The target on its own."""
        batch = batch.to(self.device)
        kept = batch.mask.flatten().nonzero()[:, 0]
        labels = batch.labels.flatten()
        predicting = (labels != NO_LABEL).nonzero()[:, 0]
        final = self._forward(batch)
        return Reference(batch, kept, predicting, self.stream(kept), final[predicting], labels[predicting])

    def final(self, reference: Reference, adapters: Any, layers: list[int] | None = None) -> Tensor:
        """[m, D]: outputs of the last norm with the given layers (None: all) from the hybrid with ``adapters``."""
        with hybrid(self.target, self.base, adapters, layers=layers):
            return self._forward(reference.batch)[reference.predicting]

    def stream(self, kept: Tensor) -> list[Tensor]:
        """L + 1 residuals of the last forward, [n, D]."""
        return [h.flatten(0, 1)[kept.to(h.device)] for h in self._stream]

    def _forward(self, batch: TokenBatch) -> Tensor:
        return self._trunk(**batch.model_inputs)[0].flatten(0, 1)


@contextmanager
def comparison(target: nn.Module, base: nn.Module) -> Iterator[Comparison]:
    """Yields a :class:`Comparison`; meanwhile both models are in evaluation mode and their parameters frozen."""
    parameters = [*target.parameters(), *base.parameters()]
    flags = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with evaluating(target, base), residuals(target) as stream:
            yield Comparison(target, base, stream)
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def nmse(stream: list[Tensor], reference: list[Tensor]) -> Tensor:
    """``sum_t ||h_t - h*_t||^2 / (sum_t ||h*_t||^2 + tiny)`` for each of L + 1 residuals: [L + 1], float32 or more."""
    found = []
    for h, ref in zip(stream, reference, strict=True):
        h, ref = (t if t.dtype == torch.float64 else t.float() for t in (h, ref))
        found.append((h - ref).square().sum() / (ref.square().sum() + torch.finfo(ref.dtype).tiny))
    return torch.stack([value.to(found[0].device) for value in found])


class AdapterTask:
    """Trains the adapters of all layers together.

    A step runs the target once without gradient, then one forward after the other with gradient: the adapted hybrid
    (KL, L1 and NMSE are back-propagated together: they share its graph), then every bridging model on its own. Each
    graph is freed before the next forward begins, and the vocabulary is differentiated piece by piece, so that the
    peak is one graph of the model. "loss" is the optimised sum without L1, whose weight changes.

    Args:
        models: see :func:`comparison`.
        adapters: of all layers; changed in place; float32 (or float64).
        objective: see :class:`AdapterObjective`.
        seed: of the layers at which the bridging models switch: a function of seed and step.
        trained: names of the parameters to train.
        betas, clip: of Adam.
    """

    divergence = (3.0, 1.0)
    parts = 1

    def __init__(
        self,
        models: Comparison,
        adapters: AdapterSet,
        objective: AdapterObjective,
        *,
        seed: int,
        trained: tuple[str, ...] = ("W_enc", "b_enc", "W_dec", "b_dec"),
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float = 1.0,
    ) -> None:
        self.adapters = adapters
        self._models = models
        self._objective = objective
        self._seed = seed
        self._steps = 0
        self._dense = [True] * len(adapters)
        self._written: list[tuple[Tensor, Tensor] | None] = [None] * len(adapters)
        parameters: dict[str, Tensor] = {}
        for i, adapter in enumerate(adapters):
            for name, parameter in adapter.named_parameters():
                parameter.requires_grad_(name in trained)
                if name in trained:
                    parameters[f"{i}.{name}"] = parameter
        self.optimiser = Optimiser([Group(parameters)], betas=betas, eps=1e-8, clip=clip)

    def split(self, batch: TokenBatch, step: int) -> list[tuple[TokenBatch, int]]:
        return [(batch, step)]

    def backward(self, part: tuple[TokenBatch, int]) -> dict[str, Tensor]:
        batch, step = part
        reference = self._models.reference(batch)
        metrics = self._adapted(reference, step)
        bridge = sum(self._bridged(reference, k) for k in self._cutoffs(step))
        objective = self._objective
        metrics["bridge"] = metrics["adapt"].new_zeros(()) + bridge / objective.cutoffs
        metrics["loss"] = (
            objective.adapt * metrics["adapt"]
            + objective.nmse * metrics["nmse"].mean()
            + objective.bridge * metrics["bridge"]
        )
        return metrics

    def _adapted(self, reference: Reference, step: int) -> dict[str, Tensor]:
        objective = self._objective
        recorded = {i: partial(self._contribution, i, record=True) for i in range(len(self.adapters))}
        loss = self._loss(self._models.final(reference, recorded), reference)
        errors = nmse(self._models.stream(reference.kept), reference.stream)
        written, active = self._sums(reference.kept)
        weight = objective.l1 * min(1.0, (step + 1) / objective.l1_ramp if objective.l1_ramp else 1.0)
        total = objective.adapt * loss + weight * written.sum() + objective.nmse * errors.mean()
        total.backward()
        return {"adapt": loss.detach(), "nmse": errors.detach(), "l1": written.detach(), "l0": active}

    def _bridged(self, reference: Reference, k: int) -> Tensor:
        """Adapted below layer k and the target's own from there on, and the other way round."""
        n = self._models.n_layers
        total = reference.final.new_zeros((), dtype=torch.float64)
        for layers in (list(range(k)), list(range(k, n))):
            if layers:
                adapted = {i: partial(self._contribution, i) for i in layers}
                loss = self._loss(self._models.final(reference, adapted, layers), reference)
                (self._objective.bridge / self._objective.cutoffs * loss).backward()
                total += loss.detach()
        return total

    def _loss(self, final: Tensor, reference: Reference) -> Tensor:
        divergence = self._models.divergence
        if self._objective.loss == "kl":
            total = divergence.kl(final, reference.final)
        else:
            total = divergence.cross_entropy(final, reference.labels)
        return total / max(len(final), 1)

    def _cutoffs(self, step: int) -> list[int]:
        """Layers at which this step switches, of 0 to L, without repetition."""
        rng = np.random.default_rng([self._seed % 2**63, step])
        order = rng.permutation(self._models.n_layers + 1).tolist()
        return order[: self._objective.cutoffs] if self._objective.bridge else []

    def _contribution(self, i: int, x: Tensor, *, record: bool = False) -> Tensor:
        """What adapter i adds, [batch, T, D]; records per token what its features write and how many there are."""
        adapter = self.adapters[i]
        wide = x.to(adapter.W_enc)
        if self._dense[i]:
            f = torch.relu(nn.functional.linear(wide, adapter.W_enc, adapter.b_enc))
            output = f @ adapter.W_dec + adapter.b_dec
            if record:
                self._written[i] = (f @ adapter.W_dec.norm(dim=1)).flatten(), (f > 0).sum(-1).flatten()
        else:
            acts = adapter.encode(wide)
            output = adapter.decode(acts)
            if record:
                values = acts.values * adapter.W_dec.norm(dim=1)[acts.indices.long()]
                written = values.new_zeros(acts.n_tokens).index_add(0, acts.tokens, values)
                self._written[i] = written, acts.l0().flatten()
        return output.to(x)

    def _sums(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Means over the kept tokens of what was recorded: written [L], active [L]."""
        pairs = [pair for pair in self._written if pair is not None]
        self._written = [None] * len(self.adapters)
        device = pairs[0][0].device
        written, active = (
            torch.stack(
                [pair[j][kept.to(pair[j].device)].to(pairs[0][0]).mean().to(device) for pair in pairs]
            )
            for j in (0, 1)
        )
        return written, active

    @torch.no_grad()
    def after_update(self, metrics: dict[str, Tensor]) -> None:
        self._steps += 1
        if self._steps % LOOK_AT_DENSITY == 0:
            shares = zip(metrics["l0"].tolist(), self.adapters, strict=True)
            self._dense = [active / adapter.n_features > DENSE_ABOVE for active, adapter in shares]

    def combine(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        return columns

    def divided(self, name: str) -> bool:
        return False

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"steps": self._steps, "dense": list(self._dense)}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self._steps, self._dense = values["steps"], list(values["dense"])
