"""FTFA: fine-tuning with frozen attention. Only the MLPs learn, and the report proves it.

Beside it, with the same loop and data, what it is compared with: fine-tuning of the whole model, and LoRA.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from fasttc._files import atomic_folder
from fasttc.models import evaluating, ffn_parameters, lora, recomputed
from fasttc.training.causal import CausalTask, cross_entropy, hash_tensors
from fasttc.training.data import TokenData, open_data
from fasttc.training.fit import identify, run_loop, save_result
from fasttc.training.loop import Progress, Run
from fasttc.training.optimiser import Kind, check_kind
from fasttc.training.options import TrainingOptions, make_options, run_folder, seeded
from fasttc.training.report import Report, common

Parameters = Literal["ffn", "all", "lora"]


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions):
    """Options of :func:`finetune`, with those of :class:`fasttc.training.options.TrainingOptions`.

    Attributes:
        parameters: "ffn" (FTFA): all parameters inside MLPs, nothing else; "all": the whole model; "lora": low-rank
            matrices beside every linear layer, merged into the weights at the end (needs peft).
        prompt, answer: how a record becomes a prompt and the answer to learn after it, instead of ``text``; the prompt
            is read, and left out of the loss. See :func:`fasttc.training.documents.read_documents`.
        chat: puts both into the tokenizer's chat template.
        optimiser: "adamw", or "adamw8bit", whose state takes a quarter of the memory (needs bitsandbytes).
        weight_decay: of AdamW.
        micro_batch: rows that run at a time; the gradients of the ``batch_size`` rows of a step are added up, so that
            it changes memory and not the result (but for rounding). None: all at once.
        checkpointing: keeps no activations inside blocks for the backward pass and computes them again: less memory
            for about a third more time, the same bits.
        lora_rank: of the matrices of "lora".
        lora_alpha: "lora" adds ``alpha / rank`` times their product; None: twice the rank.
    """

    parameters: Parameters = "ffn"
    prompt: str | None = None
    answer: str | None = None
    chat: bool = False
    optimiser: Kind = "adamw"
    weight_decay: float = 0.0
    micro_batch: int | None = None
    checkpointing: bool = False
    lora_rank: int = 8
    lora_alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters not in get_args(Parameters):
            expected = ", ".join(get_args(Parameters))
            raise ValueError(f"parameters: expected one of {expected}, got {self.parameters!r}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay!r}")
        check_kind(self.optimiser)
        self.positive_int("lora_rank")
        if self.micro_batch is not None:
            self.positive_int("micro_batch")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha: expected a number > 0, got {self.lora_alpha!r}")

    def open(self, model: nn.Module, data: Any, tokenizer: Any) -> TokenData:
        return open_data(
            model,
            data,
            tokenizer,
            prompt=self.prompt,
            answer=self.answer,
            chat=self.chat,
            **self.data_options(),
        )


@dataclass(frozen=True)
class FinetuneReport(Report):
    """Of a fine-tuning.

    Attributes:
        ce_before, ce_after: next-token cross-entropy on validation documents, nats per token; with prompts, of answers.
        trained: names of the parameters that were trained (of "lora": of the added matrices); trained_parameters:
            how many numbers they hold.
        frozen: how many parameters and buffers were not to change.
        sha256_before, sha256_after: over names, shapes, dtypes and bytes of all those; equal, or the training
            would have failed. (Of "lora" before the matrices are merged: the base's own weights.)
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
        (fine-tuned model, report). Parameters require gradients as they did before. With "lora" too it is a plain
        model: the matrices are merged into its weights.

    Raises:
        ValueError, TypeError: bad options or data; data that changes nothing; "lora" without peft, or for a model with
            adapters; a checkpoint of another configuration; a loss that diverges before the first checkpoint; after it
            the weights of the last one are the result, and ``stopped`` of the report says so.
        Interrupted: Ctrl-C; the checkpoint resumes.
        ProcessLost: another process of the same training has ended; the checkpoint resumes.
    """
    config = make_options(FinetuneOptions, "finetune", options)
    lr = config.lr or 1e-4
    run = Run(run_folder(out), resume, progress, callbacks, checkpoint_every, log_every, "finetune")
    tokens = config.open(model, data, tokenizer)
    identity = identify(run, model, tokens, config, lr)
    trained = model if inplace else copy.deepcopy(model)

    def measure() -> float:
        batches = tokens.batches("validation", config.batch_size, max_tokens=config.validation_tokens)
        return cross_entropy(trained, batches)

    with _put_back(trained):
        ce_before = measure()
        with seeded(config.seed), _learner(trained, config) as (learner, names):
            task = CausalTask(
                learner,
                names,
                rows=config.micro_batch,
                processes=run.processes,
                kind=config.optimiser,
                betas=(0.9, config.beta2),
                weight_decay=config.weight_decay,
                clip=config.clip,
            )
            before = _hashes(learner, names)
            with recomputed(learner) if config.checkpointing else nullcontext():
                outcome = run_loop(task, tokens, config, lr, run, identity)
            after = _hashes(learner, names)
            _check_moved(before, after, outcome.steps)
            n_trained = sum(learner.get_parameter(name).numel() for name in names)
        ce_after = measure()
    report = FinetuneReport(
        **common("finetune", outcome, tokens, config.seed, {**config.to_dict(), "lr": lr}),
        ce_before=ce_before,
        ce_after=ce_after,
        trained=names,
        trained_parameters=n_trained,
        frozen=before["frozen"][0],
        sha256_before=before["frozen"][1],
        sha256_after=after["frozen"][1],
    )
    save_result(run, out, lambda path: _save(trained, tokenizer, path), report)
    return trained, report


@contextmanager
def _learner(model: nn.Module, config: FinetuneOptions) -> Iterator[tuple[nn.Module, list[str]]]:
    """What runs in training, and the names of its parameters that are trained."""
    if config.parameters == "lora":
        alpha = 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
        with lora(model, config.lora_rank, alpha) as wrapped:
            yield wrapped
    elif config.parameters == "ffn":
        yield model, ffn_parameters(model)
    else:
        yield model, [name for name, _ in model.named_parameters()]


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards parameters require gradients and modules have their mode as before."""
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


def _hashes(model: nn.Module, trained: Sequence[str]) -> dict[str, tuple[int, str]]:
    everything = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    frozen = set(everything) - set(trained)
    return {"frozen": hash_tensors(model, exclude=trained), "trained": hash_tensors(model, exclude=frozen)}


def _check_moved(before: dict[str, tuple[int, str]], after: dict[str, tuple[int, str]], steps: int) -> None:
    """What was to stay has stayed, and what was to learn has moved."""
    if before["frozen"] != after["frozen"]:
        one, two = before["frozen"][1], after["frozen"][1]
        raise RuntimeError(f"frozen tensors changed: sha256 {one} before, {two} after training")
    if before["trained"] == after["trained"]:
        raise ValueError(
            f"data: expected text that changes the model, but {steps} steps left every trained parameter as it was "
            "(nothing to predict in it, or a learning rate below the precision of the weights)"
        )


def _save(model: Any, tokenizer: Any, path: str | Path) -> None:
    with atomic_folder(path) as folder:
        model.save_pretrained(folder)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
