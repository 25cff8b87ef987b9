"""The task of next-token prediction with part of a model frozen, its loss, and a hash that proves the freezing."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fasttc.models import anatomy
from fasttc.training.distributed import Processes
from fasttc.training.optimiser import Group, Kind, Optimiser
from fasttc.training.packing import NO_LABEL, TokenBatch

LOGITS_AT_ONCE = 2**26
"""Logits held at a time (256 MiB in float32); more are computed in pieces, and once more for the gradient."""


class CausalTask:
    """Next-token prediction with the named parameters trainable and all others frozen.

    Args:
        model: in the mode it is to run in.
        names: of the parameters that learn.
        rows: that run at a time; the gradients of a block are added up (float32). None: all of a process at once.
        processes: that share out the rows of a block.
        kind, betas, weight_decay, clip: see :class:`fasttc.training.optimiser.Optimiser`.
    """

    divergence = (3.0, 1.0)
    parts = 1

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        rows: int | None = None,
        processes: Processes | None = None,
        kind: Kind = "adamw",
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
    ) -> None:
        wanted = set(names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        self.model = model
        self._rows = rows
        self._processes = processes or Processes()
        self._loss = NextToken(model)
        trained = {name: p for name, p in model.named_parameters() if name in wanted}
        self.optimiser = Optimiser(
            [Group(trained)], kind=kind, betas=betas, weight_decay=weight_decay, clip=clip, eps=1e-8
        )

    def split(self, batch: TokenBatch, step: int) -> Sequence[TokenBatch]:
        n = len(batch.labels)
        if n < self._processes.size:
            raise ValueError(
                f"batch_size: expected at least a row for each of {self._processes.size} processes, got {n}"
            )
        return [batch]

    def backward(self, part: TokenBatch) -> dict[str, Tensor]:
        """Gradients of the mean over the labelled positions of the whole block, whoever runs which of its rows."""
        count = max(int((part.labels != NO_LABEL).sum()), 1)
        mine = self._processes.share(len(part.labels))
        losses = []
        for start in range(mine.start, mine.stop, self._rows or len(part.labels)):
            stop = min(start + (self._rows or len(part.labels)), mine.stop)
            loss = self._loss(part.take(slice(start, stop)))[0] / count
            loss.backward()
            self.optimiser.collect()
            losses.append(loss.detach())
        whole = torch.stack(losses).sum()
        self._processes.add([whole, *self.optimiser.gradients()])
        return {"loss": whole}

    def after_update(self, metrics: dict[str, Tensor]) -> None:
        """Nothing follows."""

    def combine(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        return columns

    def divided(self, name: str) -> bool:
        return False

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        """All there is to restore is in the optimiser."""


class NextToken:
    """Cross-entropy of a model on blocks; the head runs only where there is a label.

    Args:
        model: in the mode it is to run in.
        each: gives the loss at every labelled position, in order, instead of their sum.
    """

    def __init__(self, model: nn.Module, *, each: bool = False) -> None:
        self._reduction = "none" if each else "sum"
        parts = anatomy(model)
        self._trunk = model.get_submodule(parts.trunk)
        self._head = model.get_submodule(parts.lm_head)
        self._softcap = parts.final_softcap
        self._device = next(model.parameters()).device
        self._rows = max(1, LOGITS_AT_ONCE // parts.vocab_size)

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, int]:
        """(sum over labelled positions in nats, or all of them; how many there were)."""
        places = (batch.labels != NO_LABEL).flatten().nonzero()[:, 0]
        labels = batch.labels.flatten()[places].to(self._device)
        final = self._trunk(**batch.to(self._device).model_inputs)[0].flatten(0, 1)[places.to(self._device)]
        if len(places) <= self._rows:
            return self._piece(final, labels), len(places)
        pieces = zip(final.split(self._rows), labels.split(self._rows), strict=True)
        losses = [checkpoint(self._piece, f, label, use_reentrant=False) for f, label in pieces]
        whole = torch.cat(losses) if self._reduction == "none" else torch.stack(losses).sum()
        return whole, len(places)

    def _piece(self, final: Tensor, labels: Tensor) -> Tensor:
        logits = self._head(final)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return F.cross_entropy(logits, labels, reduction=self._reduction)


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
