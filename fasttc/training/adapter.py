"""Transcoder adapters: what fine-tuning changed in the MLPs, learned as a few sparse features beside the base's."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import fasttc
from fasttc.models import adapter_sites, anatomy, check_pair, check_same_tokenizer
from fasttc.nn import AdapterSet, TranscoderAdapter
from fasttc.training.adapter_quality import AdapterQuality, measure_hybrids
from fasttc.training.bridging import AdapterObjective, AdapterTask, Comparison, comparison
from fasttc.training.checkpoint import model_fingerprint
from fasttc.training.data import TokenData
from fasttc.training.fit import identify, model_name, run_loop, save_result
from fasttc.training.loop import Progress, Run
from fasttc.training.options import TrainingOptions, make_options, run_folder, seeded
from fasttc.training.report import Report, common

DEFAULT_LR = 8e-4


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(TrainingOptions):
    """Options of :func:`train_adapters`, with those of :class:`fasttc.training.options.TrainingOptions`.

    Attributes:
        n_features: F of every layer.
        adapt, l1, nmse, bridge, cutoffs, loss: see :class:`fasttc.training.bridging.AdapterObjective`.
        l1_ramp: share of the steps in which the weight of L1 rises from 0.
        bias_only: trains decoder biases and nothing else: no feature is ever active. What features explain is what
            they explain beyond this.
    """

    n_features: int = 1024
    adapt: float = 1.0
    l1: float = 1e-3
    l1_ramp: float = 0.1
    nmse: float = 1.0
    bridge: float = 2.0
    cutoffs: int = 1
    loss: Literal["kl", "lm"] = "kl"
    bias_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_features", "cutoffs"):
            self.positive_int(name)
        for name in ("adapt", "l1", "nmse", "bridge"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}")
        if not 0 <= self.l1_ramp <= 1:
            raise ValueError(f"l1_ramp: expected a share of the steps in [0, 1], got {self.l1_ramp!r}")
        if self.loss not in ("kl", "lm"):
            raise ValueError(f"loss: expected 'kl' or 'lm', got {self.loss!r}")
        if not self.adapt + self.nmse + self.bridge > 0:
            raise ValueError("adapt, nmse, bridge: expected one of them above 0, got none")

    def objective(self, context: int) -> AdapterObjective:
        """With the ramp in steps."""
        ramp = round(self.l1_ramp * self.steps(context))
        return AdapterObjective(self.adapt, self.l1, ramp, self.nmse, self.bridge, self.cutoffs, self.loss)


@dataclass(frozen=True)
class AdapterReport(Report):
    """Of adapters trained between a target and its base.

    Attributes:
        hybrid: the hybrid without adapters against the target, on validation documents.
        adapted: the same with adapters.
    """

    hybrid: AdapterQuality = field(kw_only=True)
    adapted: AdapterQuality = field(kw_only=True)

    @property
    def kl_recovered(self) -> float:
        """Share of the hybrid's KL to the target that the adapters take away."""
        return self.adapted.kl_recovered(self.hybrid)

    def to_dict(self) -> dict[str, Any]:
        qualities = {name: getattr(self, name).to_dict() for name in ("hybrid", "adapted")}
        return {**asdict(self), **qualities, "kl_recovered": self.kl_recovered}


def train_adapters(
    target: Any,
    base: Any,
    data: Any,
    tokenizer: Any = None,
    *,
    base_tokenizer: Any = None,
    out: str | Path | None = None,
    resume: bool | str = False,
    progress: bool = True,
    callbacks: Sequence[Callable[[Progress], None]] = (),
    checkpoint_every: int | None = None,
    log_every: int = 10,
    **options: Any,
) -> tuple[AdapterSet, AdapterReport]:
    """Trains one adapter per layer so that the base's MLPs with adapters act like the target's (Hu et al. 2026).

    Attention, embeddings, norms and head are the target's; only adapters are trained. Losses, and the order in which
    they are back-propagated: :class:`fasttc.training.bridging.AdapterTask`.

    Args:
        target: the fine-tuned model; base: the one it came from. Neither is changed. Any supported family.
        data: see :func:`fasttc.training.documents.read_documents`, or a :class:`fasttc.training.data.TokenData`.
        tokenizer: for text. base_tokenizer: of the base, if it shall be compared with it.
        out: folder for the adapters; checkpoint, log and report go to ``<out>.run``.
        resume, progress, callbacks, checkpoint_every, log_every: see :class:`fasttc.training.loop.Run`. A resumed run
            ends with the bits of one that was never stopped.
        options: fields of :class:`AdapterOptions`. The default of ``lr`` is the paper's 8e-4.

    Returns:
        (adapters of all layers in evaluation mode, report with the hybrid before and after).

    Raises:
        ValueError, TypeError: bad options or data; models of different shape or tokenizer, or that do not differ at
            all; a checkpoint of another configuration; several processes (each would do all the work); a loss that
            diverges before the first checkpoint; after it the weights of the last one are the result, and ``stopped``
            of the report says so.
        Interrupted: Ctrl-C; the checkpoint resumes.
    """
    config = make_options(AdapterOptions, "train_adapters", options)
    check_pair(target, base)
    check_same_tokenizer(tokenizer, base_tokenizer)
    run = Run(run_folder(out), resume, progress, callbacks, checkpoint_every, log_every, "adapter")
    if run.processes.size > 1:
        raise ValueError(f"train_adapters: expected one process, got {run.processes.size}")
    tokens = config.open(target, data, tokenizer)
    lr = config.lr or DEFAULT_LR
    identity = identify(run, target, tokens, config, lr, {"base": model_fingerprint(base)})
    with seeded(config.seed), comparison(target, base) as models:
        before = _quality(models, None, tokens, config)
        if before.kl == 0:
            raise ValueError("base: expected a model whose MLPs differ from the target's, got the same MLPs")
        adapters = _new_adapters(target, config)
        task = AdapterTask(
            models,
            adapters,
            config.objective(tokens.context),
            seed=config.seed,
            trained=("b_dec",) if config.bias_only else ("W_enc", "b_enc", "W_dec", "b_dec"),
            betas=(0.9, config.beta2),
            clip=config.clip,
        )
        outcome = run_loop(task, tokens, config, lr, run, identity)
        for adapter in adapters:
            adapter.eval().requires_grad_(True)
        after = _quality(models, adapters, tokens, config)
    settings = {**config.to_dict(), "lr": lr}
    report = AdapterReport(
        **common("adapter", outcome, tokens, config.seed, settings), hybrid=before, adapted=after
    )
    training = {key: value for key, value in report.to_dict().items() if key != "last"}
    adapters.metadata = {
        "fasttc_version": fasttc.__version__,
        "target": model_name(target),
        "base": model_name(base),
        "training": training,
    }
    save_result(run, out, adapters.save_pretrained, report)
    return adapters, report


def _quality(
    models: Comparison, adapters: AdapterSet | None, tokens: TokenData, config: AdapterOptions
) -> AdapterQuality:
    batches = tokens.batches("validation", config.batch_size, max_tokens=config.validation_tokens)
    return measure_hybrids(models, {"it": (adapters, None)}, batches)["it"]


def _new_adapters(target: Any, config: AdapterOptions) -> AdapterSet:
    """Untrained ones beside the target's MLPs, float64 for a float64 model and float32 for any other.

    Bias only: one feature that can never be active, since its encoder row is zero.
    """
    width = anatomy(target).d_model
    sites, adapters = adapter_sites(target), []
    for site in sites:
        place = next(target.get_submodule(site.write).parameters())
        dtype = torch.float64 if place.dtype == torch.float64 else torch.float32
        adapter = TranscoderAdapter(width, 1 if config.bias_only else config.n_features, dtype=dtype)
        if config.bias_only:
            torch.nn.init.zeros_(adapter.W_enc)
        adapters.append(adapter.to(place.device))
    return AdapterSet(adapters, sites)
