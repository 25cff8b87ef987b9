"""The metrics, as sums over a stream: exact over any number of blocks, in float64 whatever the model's dtype."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttc.ops.reference import compute_dtype
from fasttc.training.quality import LayerStatistics

LOGITS_AT_ONCE = 2**24
"""Elements of one block of logits (64 MiB in float32): N x vocabulary is never held whole."""

Logits = Callable[[Tensor], Tensor]
"""From outputs of the last norm [n, D] to logits [n, V]."""


class FeatureStatistics(LayerStatistics):
    """:class:`LayerStatistics`, and how often each feature fires."""

    def firing_rates(self) -> Tensor:
        """Share of the tokens on which each feature was active, [F] float64 on the CPU."""
        return self._fired.double().cpu() / max(self._tokens, 1)


@dataclass
class Prediction:
    """Next-token metrics of one variant of a model, as sums over positions.

    Attributes:
        count: positions.
        ce: sum of ``-log p(label)``, nats.
        kl: sum of ``KL(p_original || p)``, nats; zero unless an original is compared with.
        top1: positions whose most probable token is not the original's.
    """

    count: int = 0
    ce: float = 0.0
    kl: float = 0.0
    top1: int = 0

    @torch.no_grad()
    def add(
        self,
        logits: Logits,
        final: Tensor,
        labels: Tensor,
        original: Tensor | None = None,
        *,
        rows_at_once: int,
    ) -> None:
        """Counts positions, a bounded number at a time.

        Args:
            logits: the head.
            final: [n, D], what the variant gives to the head.
            labels: [n], the next tokens.
            original: [n, D], what the original model gives to the head; None leaves KL and top-1 out.
            rows_at_once: positions whose logits are held at one time.
        """
        for start in range(0, len(final), rows_at_once):
            rows = slice(start, start + rows_at_once)
            log_p = _log_probabilities(logits(final[rows]))
            self.ce += float(F.nll_loss(log_p, labels[rows], reduction="none").double().sum())
            if original is not None:
                log_q = _log_probabilities(logits(original[rows]))
                self.kl += float((log_q.exp() * (log_q - log_p)).sum(-1).double().sum())
                self.top1 += int((log_q.argmax(-1) != log_p.argmax(-1)).sum())
        self.count += len(final)

    def mean(self, total: float) -> float:
        return total / self.count if self.count else float("nan")


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(compute_dtype(logits)).log_softmax(-1)


def recovered(aim: float, found: float, start: float) -> float:
    """Share of the way from a start to an aim: 1 is there, 0 no better than the start; NaN where they are equal.

    Of the cross-entropy that ablation costs: ``recovered(original, replaced, ablated)``.
    """
    return (start - found) / (start - aim) if start != aim else float("nan")


@torch.no_grad()
def row_cosines(a: Tensor, b: Tensor, rows_at_once: int = 4096) -> Tensor:
    """Cosine between equal rows of two matrices [F, D]: [F] float64 on the CPU. Two zero rows have cosine 1."""
    if a.shape != b.shape:
        raise ValueError(f"expected matrices of one shape, got {list(a.shape)} and {list(b.shape)}")
    found = []
    for left, right in zip(a.split(rows_at_once), b.to(a.device).split(rows_at_once), strict=True):
        left, right = left.double(), right.double()
        norms = left.norm(dim=1) * right.norm(dim=1)
        both_zero = (left == 0).all(1) & (right == 0).all(1)
        cosine = (left * right).sum(1) / norms.where(norms > 0, 1.0)
        found.append(torch.where(both_zero, 1.0, cosine).cpu())
    return torch.cat(found)
