"""Losses over the vocabulary whose memory does not grow with tokens times vocabulary, gradient included."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fasttc.models import anatomy
from fasttc.training.causal import LOGITS_AT_ONCE

_COPIES = 4
"""Tensors [rows, vocabulary] that one piece holds at its peak: two distributions, their logits."""


class Divergence:
    """From outputs of a model's last norm, through its head, to a loss against a reference.

    Logits exist for a bounded number of rows at a time; each piece is differentiated as soon as it is computed, so
    that the backward pass needs neither logits nor a second forward of the head. The head itself gets no gradient.

    Args:
        model: whose head and soft-cap are used, frozen.
        rows: rows in a piece; None: as many as fit into 256 MiB of float32.
    """

    def __init__(self, model: nn.Module, rows: int | None = None) -> None:
        parts = anatomy(model)
        self._head: Any = model.get_submodule(parts.lm_head)
        self._softcap = parts.final_softcap
        self._rows = rows or max(1, LOGITS_AT_ONCE // (_COPIES * parts.vocab_size))

    def kl(self, final: Tensor, reference: Tensor) -> Tensor:
        """``sum_t KL(p_reference || p)`` in nats, a scalar, differentiable once in ``final``.

        Args:
            final, reference: [n, D]; the reference is a constant.
        """

        def piece(part: Tensor, rows: slice) -> Tensor:
            with torch.no_grad():
                log_q = self._log_probabilities(reference[rows])
            return F.kl_div(self._log_probabilities(part), log_q, log_target=True, reduction="sum")

        return _InPieces.apply(final, piece, self._rows)  # type: ignore[return-value]

    def cross_entropy(self, final: Tensor, labels: Tensor) -> Tensor:
        """``sum_t -log p(label_t)`` in nats, a scalar, differentiable once in ``final`` [n, D]; labels [n]."""

        def piece(part: Tensor, rows: slice) -> Tensor:
            return F.nll_loss(self._log_probabilities(part), labels[rows], reduction="sum")

        return _InPieces.apply(final, piece, self._rows)  # type: ignore[return-value]

    @torch.no_grad()
    def disagreement(self, final: Tensor, reference: Tensor) -> int:
        """On how many rows the most probable tokens differ."""
        pieces = zip(final.split(self._rows), reference.split(self._rows), strict=True)
        return sum(int((self._head(f).argmax(-1) != self._head(r).argmax(-1)).sum()) for f, r in pieces)

    def _log_probabilities(self, final: Tensor) -> Tensor:
        logits = self._head(final)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits.log_softmax(-1)


class _InPieces(torch.autograd.Function):
    """A sum over rows, computed and differentiated piece by piece in the forward pass."""

    @staticmethod
    def forward(ctx: Any, final: Tensor, piece: Callable[[Tensor, slice], Tensor], rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(final) if wanted else None
        total = final.new_zeros((), dtype=torch.float64 if final.dtype == torch.float64 else torch.float32)
        for start in range(0, len(final), rows):
            place = slice(start, start + rows)
            with torch.set_grad_enabled(wanted):
                part = final[place].detach().requires_grad_(wanted)
                value = piece(part, place)
            if gradient is not None:
                gradient[place] = torch.autograd.grad(value, part)[0]
            total += value.detach()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None
