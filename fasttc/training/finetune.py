"""FTFA: fine-tuning with frozen attention. Only the MLPs learn, and the report proves it."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fasttc._files import atomic_folder
from fasttc.models import anatomy, ffn_parameters
from fasttc.training.fit import run_loop, save_result
from fasttc.training.loop import Progress, Run
from fasttc.training.optimiser import Group, Optimiser
from fasttc.training.options import TrainingOptions, make_options, run_folder, seeded
from fasttc.training.packing import NO_LABEL, TokenBatch
from fasttc.training.report import Report, common

LOGITS_AT_ONCE = 2**26
"""Logits held at a time (256 MiB in float32); more are computed in pieces, and once more for the gradient."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions):
    """Options of :func:`finetune_ffn`, with those of :class:`fasttc.training.options.TrainingOptions`.

    Attributes:
        parameters: "ffn": all parameters inside MLPs, nothing else; "all": the whole model, for comparison or to
            train a small one.
        weight_decay: of AdamW.
    """

    parameters: Literal["ffn", "all"] = "ffn"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters not in ("ffn", "all"):
            raise ValueError(f"parameters: expected 'ffn' or 'all', got {self.parameters!r}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay!r}")


@dataclass(frozen=True)
class FinetuneReport(Report):
    """Of a fine-tuning.

    Attributes:
        ce_before, ce_after: next-token cross-entropy on validation documents, nats per token.
        trained: names of the parameters that were trained; trained_parameters: how many numbers they hold.
        frozen: how many parameters and buffers were not to change.
        sha256_before, sha256_after: over names, shapes, dtypes and bytes of all those; equal, or the training
            would have failed.
    """

    ce_before: float = float("nan")
    ce_after: float = float("nan")
    trained: list[str] = field(default_factory=list)
    trained_parameters: int = 0
    frozen: int = 0
    sha256_before: str = ""
    sha256_after: str = ""


def finetune_ffn(model: Any, data: Any, tokenizer: Any = None, **options: Any) -> Any:
    """Fine-tunes the MLPs of a model with everything else frozen (FTFA); returns the fine-tuned model.

    :func:`finetune` with ``parameters="ffn"``, without its report.
    """
    if "parameters" in options:
        raise TypeError("finetune_ffn: trains the MLPs only; use fasttc.training.finetune(parameters=...)")
    return finetune(model, data, tokenizer, **options)[0]


def finetune(
    model: Any,
    data: Any,
    tokenizer: Any = None,
    *,
    inplace: bool = False,
    out: str | Path | None = None,
    resume: bool | str = False,
    progress: bool = True,
    callbacks: Sequence[Callable[[Progress], None]] = (),
    checkpoint_every: int | None = None,
    log_every: int = 10,
    **options: Any,
) -> tuple[Any, FinetuneReport]:
    """Fine-tunes a model on next-token prediction; by default only its MLPs (FTFA).

    Packed documents do not see each other. The model runs without dropout, so that a run is a function of its seed;
    parameters of lower precision are trained through float32 masters.

    Args:
        model: a Hugging Face causal language model of a supported family.
        data: see :func:`fasttc.training.documents.read_documents`, or a :class:`fasttc.training.data.TokenData`.
        tokenizer: for text.
        inplace: trains ``model`` itself; else a copy, and ``model`` stays as it is.
        out: folder for the fine-tuned model (``save_pretrained``). Checkpoint, log and report go to ``<out>.run``.
        resume, progress, callbacks, checkpoint_every, log_every: see :class:`fasttc.training.loop.Run`.
        options: fields of :class:`FinetuneOptions`. The default of ``lr`` is 1e-4.

    Returns:
        (fine-tuned model, report). Parameters require gradients as they did before.

    Raises:
        ValueError, TypeError: bad options or data; a checkpoint of another configuration; diverging loss.
        Interrupted: Ctrl-C; the checkpoint resumes.
    """
    config = make_options(FinetuneOptions, "finetune", options)
    lr = config.lr or 1e-4
    run = Run(run_folder(out), resume, progress, callbacks, checkpoint_every, log_every, "finetune")
    tokens = config.open(model, data, tokenizer)
    trained = model if inplace else copy.deepcopy(model)
    names = (
        ffn_parameters(trained) if config.parameters == "ffn" else [n for n, _ in trained.named_parameters()]
    )
    before = hash_tensors(trained, exclude=names)
    requires_grad = {p: p.requires_grad for p in trained.parameters()}
    training = {module: module.training for module in trained.modules()}
    validation = lambda: tokens.batches(  # noqa: E731
        "validation", config.batch_size, max_tokens=config.validation_tokens
    )
    trained.eval()
    try:
        ce_before = cross_entropy(trained, validation())
        with seeded(config.seed):
            task = CausalTask(trained, names, config)
            outcome = run_loop(task, tokens, model, config, lr, run)
        ce_after = cross_entropy(trained, validation())
    finally:
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in training.items():
            module.training = mode
    after = hash_tensors(trained, exclude=names)
    if before != after:
        raise RuntimeError(f"frozen tensors changed: sha256 {before[1]} before, {after[1]} after training")
    report = FinetuneReport(
        **common("finetune", outcome, tokens, config.seed, {**config.to_dict(), "lr": lr}),
        ce_before=ce_before,
        ce_after=ce_after,
        trained=names,
        trained_parameters=sum(p.numel() for n, p in trained.named_parameters() if n in set(names)),
        frozen=before[0],
        sha256_before=before[1],
        sha256_after=after[1],
    )
    save_result(run, out, lambda path: _save(trained, tokenizer, path), report)
    return trained, report


class CausalTask:
    """Next-token prediction with the named parameters trainable and all others frozen."""

    divergence = (3.0, 1.0)

    def __init__(self, model: nn.Module, names: Sequence[str], config: FinetuneOptions) -> None:
        wanted = set(names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        self.model = model
        self._loss = NextToken(model)
        trained = {name: p for name, p in model.named_parameters() if name in wanted}
        self.optimiser = Optimiser(
            [Group(trained)],
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            clip=config.clip,
            eps=1e-8,
        )

    def backward(self, batch: TokenBatch) -> dict[str, Tensor]:
        total, count = self._loss(batch)
        loss = total / max(count, 1)
        loss.backward()
        return {"loss": loss.detach()}

    def after_step(self, metrics: dict[str, Tensor]) -> None:
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
    count = 0
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        if name in left_out:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        count += 1
    return count, digest.hexdigest()


def _save(model: Any, tokenizer: Any, path: str | Path) -> None:
    with atomic_folder(path) as folder:
        model.save_pretrained(folder)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
