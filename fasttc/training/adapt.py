"""PAT: transcoders of a base model, carried over to the fine-tuned model by a little training."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasttc.models import check_match
from fasttc.nn import Transcoder, TranscoderSet
from fasttc.training.activations import Source, activation_source
from fasttc.training.checkpoint import model_fingerprint
from fasttc.training.closed_form import HELD_OUT_TOKENS, collect_after, sample
from fasttc.training.distributed import Processes
from fasttc.training.fit import Fitting, announce, identify, save_transcoders, validation_quality
from fasttc.training.loop import Progress, Run
from fasttc.training.options import Refit, TranscoderOptions, make_options, run_folder, seeded
from fasttc.training.quality import LayerQuality
from fasttc.training.report import TranscoderReport
from fasttc.training.scratch import default_lr
from fasttc.training.sharded import ShardedTranscoder
from fasttc.training.transcoding import INITIAL_L1, Objective, TranscoderTask, activation_scales

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")

RATE = 0.25
"""Of the learning rate from scratch, with updates of 64 tokens and a refit at the end: between what is best after mild
fine-tuning (an eighth) and after severe (a half). Too high a rate first undoes what the base knows."""
COLLECT_AFTER = 0.0
"""Share of the updates whose codes the last refit leaves out: none, the encoder moves little."""


@dataclass(frozen=True, kw_only=True)
class AdaptOptions(TranscoderOptions):
    """Options of :func:`adapt`, with those of :class:`fasttc.training.options.TranscoderOptions`.

    Attributes:
        train: names of the parameters to train, of W_enc, b_enc, W_dec, b_dec, W_skip; None: all of them. Every
            transcoder must have one of them.
        train_threshold: JumpReLU thresholds are trained too; frozen otherwise.
        target_l0: JumpReLU and ReLU are steered to this mean number of active features; None: to what the base's
            transcoders have on the same validation documents, layer by layer. TopK keeps its k.
        steer: False lets L0 go where it will.
        aux: weight of the AuxK loss (TopK only).
        dead_after: tokens without activation after which a feature is dead; None: a twentieth of the budget, at
            most ten million.
    """

    update_tokens: int | None = 64
    refit: Refit = "auto"
    train: tuple[str, ...] | None = None
    train_threshold: bool = False
    target_l0: float | None = None
    steer: bool = True
    aux: float = 1 / 32
    dead_after: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train is not None:
            names = (self.train,) if isinstance(self.train, str) else tuple(self.train)
            allowed = [name for name in PARAMETERS if name != "threshold"]
            wrong = [name for name in names if name not in allowed]
            if wrong or not names:
                raise ValueError(f"train: expected some of {', '.join(allowed)}, got {wrong or 'none'}")
            self.settle("last" if {"W_dec", "b_dec"} <= set(names) else None)
            if self.refit and not {"W_dec", "b_dec"} <= set(names):
                raise ValueError(f"refit: expected W_dec and b_dec among train, got {', '.join(names)}")
            object.__setattr__(self, "train", names)
        self.settle("last")
        if self.target_l0 is not None and not self.target_l0 > 0:
            raise ValueError(f"target_l0: expected a number > 0, got {self.target_l0!r}")
        if not self.aux >= 0:
            raise ValueError(f"aux: expected a number >= 0, got {self.aux!r}")
        if self.dead_after is not None:
            self.positive_int("dead_after")

    def trained(self) -> list[str]:
        """Names of what is trained."""
        names = (
            [name for name in PARAMETERS if name != "threshold"] if self.train is None else list(self.train)
        )
        return [*names, "threshold"] if self.train_threshold else names


def adapt(
    model: Any,
    tcs: TranscoderSet,
    data: Any,
    tokenizer: Any = None,
    *,
    source: Source | None = None,
    out: str | Path | None = None,
    resume: bool | str = False,
    progress: bool = True,
    callbacks: Sequence[Callable[[Progress], None]] = (),
    checkpoint_every: int | None = None,
    log_every: int = 10,
    **options: Any,
) -> tuple[TranscoderSet, TranscoderReport]:
    """Adapts the transcoders of a base model to a fine-tuned one (PAT; methods of Tan et al., AAAI-26).

    Starts from the base's weights. The target of every layer is the output of the *fine-tuned* MLP on the inputs that
    the *fine-tuned* model gives it. Nothing of the base model itself is needed.

    Args:
        model: the fine-tuned model. It is not changed.
        tcs: transcoders of the base model; they are not changed either. Any subset of the layers.
        data, tokenizer, source, out, resume, progress, callbacks, checkpoint_every, log_every: as in
            :func:`fasttc.training.train`.
        options: fields of :class:`AdaptOptions`. The default of ``lr`` is a quarter of that of training from scratch.

    Returns:
        (adapted transcoders in the dtype of the base's, report with the quality before and after).

    Raises:
        ValueError: as :func:`fasttc.training.train`; transcoders that do not fit the model, by shape or because
            they explain nothing of it (FVU above 1 in every layer before adaptation).
        Interrupted: Ctrl-C; the checkpoint resumes.
    """
    config = make_options(AdaptOptions, "adapt", options)
    check_match(model, tcs, tcs.layers)
    _check_trains(tcs, config)
    resume = config.refit != "only" and resume  # a closed form alone has no checkpoint: it is made again
    run = Run(run_folder(out), resume, progress, callbacks, checkpoint_every, log_every, "adapt")
    tokens = config.open(model, data, tokenizer)
    lr = config.lr or RATE * default_lr(tcs[0].d_in)
    own = {"sites": [site.to_dict() for site in tcs.sites], "base": _fingerprint(tcs)}
    identity = identify(run, model, tokens, config, lr, own)
    where = (config.batch_size, run.processes, config.device, config.shard_features)
    reading = activation_source(model, tcs.sites, source, *where)
    with seeded(config.seed), reading as activations:
        held_out = sample(activations, tokens, "validation", config.batch_size, HELD_OUT_TOKENS)
        numbers = range(len(tcs))[activations.own]
        group = run.processes if config.shard_features else Processes()
        transcoders = [_working_copy(tcs[n], x, group) for n, x in zip(numbers, held_out[0], strict=True)]
        announce(run, model, transcoders, config, tokens.context, config.trained())
        before = validation_quality(activations, transcoders, tokens, config)
        _check_explains(before)
        fitting = Fitting("adapt", model, tokens, config, lr, run, identity, activations, held_out)
        fitting.start(transcoders, config.trained())
        objective = _objective(config, tcs[0], before, tokens.context)
        task = TranscoderTask(
            transcoders,
            fitting.inside,
            objective,
            [activation_scales(x, y) for x, y in zip(*fitting.held_out, strict=True)],
            numbers=numbers,
            trained=config.trained(),
            collect_after=collect_after(config, fitting.updates, COLLECT_AFTER),
            parts=config.parts(tokens.context),
            betas=(0.9, config.beta2),
            clip=config.clip,
        )
        target = objective.target_l0
        adapted, report = fitting.finish(
            task,
            settings={
                "trained": config.trained(),
                "target_l0": list(target) if isinstance(target, tuple) else target,
            },
            provenance={"base": dict(tcs.metadata)},
            before=before,
        )
        for transcoder, base in zip(adapted, tcs, strict=True):
            transcoder.to(base.W_enc.dtype)
    return save_transcoders(run, out, adapted, report), report


def _check_trains(tcs: TranscoderSet, config: AdaptOptions) -> None:
    for layer, transcoder in zip(tcs.layers, tcs, strict=True):
        names = [name for name, _ in transcoder.named_parameters() if name in PARAMETERS]
        if not set(names) & set(config.trained()):
            raise ValueError(
                f"train: expected a parameter that every transcoder has, got {', '.join(config.trained())}; "
                f"that of layer {layer} has {', '.join(names)}"
            )


def _working_copy(transcoder: Transcoder, x: torch.Tensor, group: Processes) -> Transcoder:
    """A copy, or the own share of one, where the activations are, in their precision (at least float32)."""
    taken = copy.deepcopy(transcoder) if group.size == 1 else ShardedTranscoder.of(transcoder, group)
    return taken.to(device=x.device, dtype=x.dtype)


def _check_explains(before: Sequence[LayerQuality]) -> None:
    if not any(quality.fvu <= 1 for quality in before):
        worst = ", ".join(f"layer {q.layer}: {q.fvu:.2f}" for q in before[:4])
        raise ValueError(
            f"transcoders: expected ones of this model's base, these explain nothing of it (FVU {worst}); "
            "they belong to another model, or read and write elsewhere than their sites say"
        )


def _objective(
    config: AdaptOptions, base: Transcoder, before: Sequence[LayerQuality], context: int
) -> Objective:
    steers = config.steer and base.activation in ("jumprelu", "relu")
    goal = tuple(config.target_l0 or quality.l0 for quality in before)
    patience = max(config.tokens // 20, 2 * config.batch_size * context)
    return Objective(
        aux=config.aux,
        dead_after=min(patience, 10_000_000) if config.dead_after is None else config.dead_after,
        target_l0=goal if steers else None,
        l1=INITIAL_L1 if steers else 0.0,
    )


def _fingerprint(tcs: TranscoderSet) -> str:
    return "".join(model_fingerprint(transcoder) for transcoder in tcs)
