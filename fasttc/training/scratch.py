"""Training transcoders from scratch: one for every MLP, all at once, on one stream through the model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttc import ops
from fasttc.models import anatomy, default_sites
from fasttc.nn import Site, Transcoder, TranscoderSet
from fasttc.nn.transcoder import Activation, TranscoderConfig
from fasttc.ops import SparseActs
from fasttc.training.activations import Source, activation_source
from fasttc.training.closed_form import HELD_OUT_TOKENS, collect_after, sample
from fasttc.training.distributed import Processes
from fasttc.training.fit import Fitting, announce, identify, save_transcoders
from fasttc.training.loop import Progress, Run
from fasttc.training.options import TranscoderOptions, make_options, run_folder, seeded
from fasttc.training.report import TranscoderReport
from fasttc.training.sharded import ShardedTranscoder, group_of
from fasttc.training.transcoding import INITIAL_L1, Objective, TranscoderTask, activation_scales

INITIAL_TOKENS = 2048
"""Tokens that the initial weights are fitted to."""
DENSE_ELEMENTS = 2**27
"""Largest dense [tokens, features] block of that fit: 1 GiB."""
DRAWN_ROWS = 4096
"""Rows of random weights drawn at a time."""
COLLECT_AFTER = 0.5
"""Share of the updates whose codes the last refit leaves out: they are of an encoder long gone."""


@dataclass(frozen=True, kw_only=True)
class ScratchOptions(TranscoderOptions):
    """Options of :func:`train`, with those of :class:`fasttc.training.options.TranscoderOptions`.

    Attributes:
        n_features: F, of every layer.
        k: active features per token: exactly (topk), on average over a batch (batchtopk), as the target of a
            penalty (jumprelu, relu).
        activation: "topk", "batchtopk", "jumprelu" or "relu".
        skip: adds a linear path from x to y.
        layers: of the model; None: all.
        aux: weight of the AuxK loss, by which dead features of TopK learn what the others leave over.
        k_aux: dead features used per token; None: half the model's width.
        dead_after: tokens without activation after which a feature is dead; None: a twentieth of the budget, at
            most ten million.
        l1: ReLU only: a fixed weight for the L1 penalty instead of the target.
        unit_decoder: keeps decoder rows at norm one all the time, not only at the start. Not with closed forms, which
            give rows of any norm.
    """

    n_features: int = 4096
    k: int = 32
    activation: Activation = "topk"
    skip: bool = False
    layers: tuple[int, ...] | None = None
    aux: float = 1 / 32
    k_aux: int | None = None
    dead_after: int | None = None
    l1: float | None = None
    unit_decoder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settle(None)
        for name in ("n_features", "k"):
            self.positive_int(name)
        for name in ("k_aux", "dead_after"):
            if getattr(self, name) is not None:
                self.positive_int(name)
        if self.k > self.n_features:
            raise ValueError(f"k: expected at most n_features = {self.n_features}, got {self.k}")
        for name in ("aux", "l1"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}")
        if self.l1 is not None and self.activation != "relu":
            raise ValueError(f"l1: expected None for activation {self.activation!r}, got {self.l1!r}")
        if self.unit_decoder and self.refit is not None:
            raise ValueError(
                "refit: expected None with unit_decoder (rows of a closed form have any norm), "
                f"got {self.refit!r}"
            )
        if self.shard_features and self.activation == "batchtopk":
            raise ValueError(
                "activation: expected topk, jumprelu or relu with shard_features, got 'batchtopk'"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        TranscoderConfig(
            1, self.n_features, 1, self.activation, self.k if "topk" in self.activation else None
        )


def train(
    model: Any,
    data: Any,
    tokenizer: Any = None,
    *,
    sites: Sequence[Site] | None = None,
    source: Source | None = None,
    out: str | Path | None = None,
    resume: bool | str = False,
    progress: bool = True,
    callbacks: Sequence[Callable[[Progress], None]] = (),
    checkpoint_every: int | None = None,
    log_every: int = 10,
    **options: Any,
) -> tuple[TranscoderSet, TranscoderReport]:
    """Trains transcoders for the MLPs of a model, from nothing, on the model's own activations.

    Args:
        model: a Hugging Face causal language model of a supported family. It is not changed.
        data: see :func:`fasttc.training.documents.read_documents`, or a :class:`fasttc.training.data.TokenData`.
        tokenizer: for text.
        sites: where to read and write; None: :func:`fasttc.models.default_sites`.
        source: an open source of the model's activations at these sites, for several trainings on one text; None:
            the model runs anew.
        out: folder for the transcoders. Checkpoint, log and report go to ``<out>.run``.
        resume, progress, callbacks, checkpoint_every, log_every: see :class:`fasttc.training.loop.Run`.
        options: fields of :class:`ScratchOptions`. The default of ``lr`` is :func:`default_lr`.

    Returns:
        (transcoders in float32, report), on every process that trains along (see
        :mod:`fasttc.training.distributed`). The same options, data, model, machine and number of threads give the same
        bits on a CPU, interrupted and resumed or not.

    Raises:
        ValueError, TypeError: bad options or data; a checkpoint of another configuration; a loss that diverges
            before there are weights to go back to (``patience`` of the options; ``stopped`` of the report).
        Interrupted: Ctrl-C; the checkpoint resumes.
        ProcessLost: another process of the same training has ended; the checkpoint resumes.
    """
    config = make_options(ScratchOptions, "train", options)
    resume = config.refit != "only" and resume  # a closed form alone has no checkpoint: it is made again
    run = Run(run_folder(out), resume, progress, callbacks, checkpoint_every, log_every, "train")
    tokens = config.open(model, data, tokenizer)
    chosen = _choose_sites(model, sites, config.layers)
    lr = config.lr or default_lr(anatomy(model).d_model)
    identity = identify(run, model, tokens, config, lr, {"sites": [site.to_dict() for site in chosen]})
    where = (config.batch_size, run.processes, config.device, config.shard_features)
    reading = activation_source(model, chosen, source, *where)
    with seeded(config.seed), reading as activations:
        xs, ys = sample(activations, tokens, "train", config.batch_size, INITIAL_TOKENS)
        held_out = sample(activations, tokens, "validation", config.batch_size, HELD_OUT_TOKENS)
        group = run.processes if config.shard_features else Processes()
        transcoders = initial_transcoders(xs, ys, config, layers_before=activations.own.start, group=group)
        announce(run, model, transcoders, config, tokens.context)
        fitting = Fitting("scratch", model, tokens, config, lr, run, identity, activations, held_out)
        fitting.start(transcoders)
        task = TranscoderTask(
            transcoders,
            fitting.inside,
            _objective(config, tokens.context),
            [activation_scales(x, y) for x, y in zip(*fitting.held_out, strict=True)],
            numbers=range(len(activations.sites))[activations.own],
            decoder_scale=1.0,
            # Where x has no mean, a bias alone moves a feature on all tokens; it gets the step of a whole row.
            bias_rate=math.sqrt(anatomy(model).d_model) if fitting.whitening.active else 1.0,
            collect_after=collect_after(config, fitting.updates, COLLECT_AFTER),
            parts=config.parts(tokens.context),
            betas=(0.9, config.beta2),
            clip=config.clip,
        )
        tcs, report = fitting.finish(task)
    return save_transcoders(run, out, tcs, report), report


def default_lr(d_in: int) -> float:
    """``0.08 / sqrt(D)``: a step changes a weight of a row of norm one by at most 8 % of its usual size."""
    return 0.08 / math.sqrt(d_in)


def _choose_sites(model: Any, sites: Sequence[Site] | None, layers: Sequence[int] | None) -> list[Site]:
    usual = list(default_sites(model) if sites is None else sites)
    if layers is None:
        return usual
    present = {site.layer: site for site in usual}
    missing = [layer for layer in layers if layer not in present]
    if missing or not layers:
        raise ValueError(f"layers: expected some of {sorted(present)}, got {list(layers)}")
    return [present[layer] for layer in sorted(set(layers))]


def _objective(config: ScratchOptions, context: int) -> Objective:
    steers = config.activation == "jumprelu" or (config.activation == "relu" and config.l1 is None)
    start = INITIAL_L1 if config.activation == "relu" else 0.0
    patience = max(config.tokens // 20, 2 * config.batch_size * context)
    return Objective(
        aux=config.aux,
        k_aux=config.k_aux,
        dead_after=min(patience, 10_000_000) if config.dead_after is None else config.dead_after,
        target_l0=float(config.k) if steers else None,
        l1=start if config.l1 is None else config.l1,
        unit_decoder=config.unit_decoder,
    )


@torch.no_grad()
def initial_transcoders(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    config: ScratchOptions,
    *,
    layers_before: int = 0,
    group: Processes | None = None,
) -> list[Transcoder]:
    """Transcoders before training, fitted to a first sample of x [N, D] and y [N, D_out] per layer.

    Encoder rows have random directions and one norm; biases centre the pre-activations on the sample, or features
    along the mean of x would win every time and the others never. ``b_dec`` is the mean of y. Activations are scaled
    so that K decoder rows of norm one add up to the size of y. The decoder is the ridge regression of y on the
    sample's activations (with ``unit_decoder``: random rows of norm one). JumpReLU thresholds are the quantile that
    leaves K features active. ``layers_before`` are other processes': their random numbers are drawn and dropped; so
    are those of features that others of the ``group`` have, where it has more than this process.
    """
    generator = torch.Generator().manual_seed(config.seed)
    for x, y in [(xs[0], ys[0])] * layers_before if xs else ():
        _draw(config.n_features, x.shape[1], generator, slice(0, 0))
        if config.unit_decoder:
            _draw(config.n_features, y.shape[1], generator, slice(0, 0))
    group = group or Processes()
    return [_initial_transcoder(x, y, config, generator, group) for x, y in zip(xs, ys, strict=True)]


def _initial_transcoder(
    x: Tensor, y: Tensor, config: ScratchOptions, generator: torch.Generator, group: Processes
) -> Transcoder:
    d_in, d_out, n = x.shape[1], y.shape[1], config.n_features
    own = group.share(n)
    directions = _draw(n, d_in, generator, own).to(x)
    directions /= directions.norm(dim=1, keepdim=True)
    top = _top(x - x.mean(0), directions, config.k, group)
    _, y_scale = activation_scales(x, y)
    scale = y_scale * math.sqrt(d_out) / max(float(top.relu().square().sum(-1).mean().sqrt()), 1e-12)
    floor = float(top[:, -1].mean()) * scale
    k = config.k if "topk" in config.activation else None
    width = max(0.1 * abs(floor), 1e-6)
    shape = TranscoderConfig(d_in, n, d_out, config.activation, k, config.skip, bandwidth=width)
    transcoder = _empty(shape, group, x)
    transcoder.W_enc.copy_(scale * directions)
    transcoder.b_enc.copy_(-scale * (directions @ x.mean(0)))
    transcoder.b_dec.copy_(y.mean(0))
    if config.activation == "jumprelu" and transcoder.threshold is not None:
        transcoder.threshold.fill_(max(floor, 0.0))
    elif config.activation == "relu":
        transcoder.b_enc.sub_(floor)
    if config.unit_decoder:
        decoder = _draw(n, d_out, generator, own).to(y)
        transcoder.W_dec.copy_(decoder / decoder.norm(dim=1, keepdim=True))
    else:
        transcoder.W_dec.copy_(_ridge_decoder(transcoder, x, y - y.mean(0)))
    return transcoder


def _draw(n: int, width: int, generator: torch.Generator, own: slice) -> Tensor:
    """The own rows of standard normal numbers [n, width], of which no more are ever held than a block."""
    found = []
    for first in range(0, n, DRAWN_ROWS):
        rows = torch.randn(min(DRAWN_ROWS, n - first), width, generator=generator)
        found.append(rows[max(own.start - first, 0) : max(own.stop - first, 0)])
    return torch.cat(found)


def _top(x: Tensor, directions: Tensor, k: int, group: Processes) -> Tensor:
    """The k largest of ``x directions^T`` [N, k] over the directions of all processes, largest first."""
    own = min(k, len(directions))
    found = ops.encode(x, directions, directions.new_zeros(len(directions)), k=own, relu=False).values
    offers = group.collect(nn.functional.pad(found, (0, k - own), value=-torch.inf))
    return torch.cat(offers, 1).sort(dim=1, descending=True).values[:, :k]


def _empty(shape: TranscoderConfig, group: Processes, like: Tensor) -> Transcoder:
    """A transcoder, or the own share of one, in the dtype and place of a tensor, without having drawn weights."""
    if group.size == 1:
        transcoder = Transcoder(**shape.to_dict(), dtype=like.dtype, device="meta")
    else:
        transcoder = ShardedTranscoder(shape, group, dtype=like.dtype, device="meta")
    transcoder = transcoder.to_empty(device=like.device)
    for parameter in (*transcoder.parameters(), *transcoder.buffers()):
        parameter.zero_()
    return transcoder


def _ridge_decoder(transcoder: Transcoder, x: Tensor, y: Tensor, ridge: float = 0.1) -> Tensor:
    """Own decoder rows by ridge regression of y on the features of x: ``(A^T A + λ)^-1 A^T y``.

    λ is ``ridge`` times the mean squared activation sum of a feature. Solved in the smaller of F x F and N x N; in the
    latter, ``A^T (A A^T + λ)^-1 y``, where processes share out the features.
    """
    group, n_features = group_of(transcoder), transcoder.n_features
    n = max(256, min(len(x), DENSE_ELEMENTS // n_features))
    acts = transcoder.train().encode(x[:n])
    acts = replace(acts, values=acts.values.double(), gates=None)
    y = y[:n].double()
    squares = acts.values.square().sum()
    group.add([squares])
    penalty = max(ridge * float(squares) / n_features, 1e-12)
    if group.size == 1 and n_features <= len(y):
        A = acts.to_dense()
        return torch.cholesky_solve(A.T @ y, _factor(A.T @ A, penalty)).to(x.dtype)
    gram = _gram_of_tokens(acts)
    group.add([gram])
    return ops.segment(acts, torch.cholesky_solve(y, _factor(gram, penalty))).to(x.dtype)


def _gram_of_tokens(acts: SparseActs) -> Tensor:
    """``A A^T`` [N, N], a block of features at a time."""
    gram = acts.values.new_zeros(acts.n_tokens, acts.n_tokens)
    tokens, features, values = acts.active()
    width = max(DENSE_ELEMENTS // 8 // max(acts.n_tokens, 1), 1)
    for first in range(0, acts.n_features, width):
        inside = (features >= first) & (features < first + width)
        block = gram.new_zeros(acts.n_tokens, min(width, acts.n_features - first))
        block[tokens[inside], features[inside] - first] = values[inside]
        gram.addmm_(block, block.T)
    return gram


def _factor(gram: Tensor, penalty: float) -> Tensor:
    gram.diagonal().add_(penalty)
    return torch.linalg.cholesky(gram)
