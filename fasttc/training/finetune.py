"""FTFA: fine-tuning with frozen attention. Only the MLPs learn, and the report proves it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fasttc._files import atomic_folder
from fasttc.models import ffn_parameters
from fasttc.training.causal import CausalTask, cross_entropy, hash_tensors
from fasttc.training.fit import run_loop, save_result
from fasttc.training.loop import Progress, Run
from fasttc.training.options import TrainingOptions, make_options, run_folder, seeded
from fasttc.training.report import Report, common


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
            task = CausalTask(
                trained,
                names,
                betas=(0.9, config.beta2),
                weight_decay=config.weight_decay,
                clip=config.clip,
            )
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


def _save(model: Any, tokenizer: Any, path: str | Path) -> None:
    with atomic_folder(path) as folder:
        model.save_pretrained(folder)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
