"""The task of next-token prediction with part of a model frozen, its loss, and a hash that proves the freezing."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fasttc.models import anatomy
from fasttc.training.optimiser import Group, Optimiser
from fasttc.training.packing import NO_LABEL, TokenBatch

LOGITS_AT_ONCE = 2**26
"""Logits held at a time (256 MiB in float32); more are computed in pieces, and once more for the gradient."""


class CausalTask:
    """Next-token prediction with the named parameters trainable and all others frozen."""

    divergence = (3.0, 1.0)
    parts = 1

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
    ) -> None:
        wanted = set(names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        self.model = model
        self._loss = NextToken(model)
        trained = {name: p for name, p in model.named_parameters() if name in wanted}
        self.optimiser = Optimiser(
            [Group(trained)], betas=betas, weight_decay=weight_decay, clip=clip, eps=1e-8
        )

    def split(self, batch: TokenBatch, step: int) -> Sequence[TokenBatch]:
        return [batch]

    def backward(self, part: TokenBatch) -> dict[str, Tensor]:
        total, count = self._loss(part)
        loss = total / max(count, 1)
        loss.backward()
        return {"loss": loss.detach()}

    def after_update(self, metrics: dict[str, Tensor]) -> None:
        """Nothing follows."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """All there is to restore is in the optimiser."""


class NextToken:
    """Cross-entropy of a model on blocks, summed; the head runs only where there is a label."""

    def __init__(self, model: nn.Module) -> None:
        parts = anatomy(model)
        self._trunk = model.get_submodule(parts.trunk)
        self._head = model.get_submodule(parts.lm_head)
        self._softcap = parts.final_softcap
        self._device = next(model.parameters()).device
        self._rows = max(1, LOGITS_AT_ONCE // parts.vocab_size)

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, int]:
        """(sum over labelled positions in nats, how many there were)."""
        places = (batch.labels != NO_LABEL).flatten().nonzero()[:, 0]
        labels = batch.labels.flatten()[places].to(self._device)
        final = self._trunk(**batch.to(self._device).model_inputs)[0].flatten(0, 1)[places.to(self._device)]
        if len(places) <= self._rows:
            return self._piece(final, labels), len(places)
        pieces = zip(final.split(self._rows), labels.split(self._rows), strict=True)
        losses = [checkpoint(self._piece, f, label, use_reentrant=False) for f, label in pieces]
        return torch.stack(losses).sum(), len(places)

    def _piece(self, final: Tensor, labels: Tensor) -> Tensor:
        logits = self._head(final)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return F.cross_entropy(logits, labels, reduction="sum")


@torch.no_grad()
def cross_entropy(model: nn.Module, batches: Iterable[TokenBatch]) -> float:
    """Mean next-token cross-entropy over blocks, nats per token. The model's mode is left as it is."""
    loss = NextToken(model)
    total, count = 0.0, 0
    for batch in batches:
        part, n = loss(batch)
        total, count = total + float(part), count + n
    if count == 0:
        raise ValueError("data: expected documents of at least two tokens, got none")
    return total / count


@torch.no_grad()
def hash_tensors(model: nn.Module, exclude: Iterable[str] = ()) -> tuple[int, str]:
    """(how many, SHA-256 as hex) of all parameters and buffers but the excluded, over names, dtypes, shapes, bytes."""
    left_out = set(exclude)
    digest = hashlib.sha256()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    count = 0
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if name in left_out:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        count += 1
    return count, digest.hexdigest()
