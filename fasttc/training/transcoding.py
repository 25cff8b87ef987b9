"""The task of training transcoders, from scratch or from a warm start: all layers on one forward of the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fasttc.nn import Transcoder
from fasttc.training import losses
from fasttc.training.activations import Source
from fasttc.training.checkpoint import SHARE
from fasttc.training.optimiser import Group, Optimiser
from fasttc.training.packing import TokenBatch
from fasttc.training.refit import DecoderSums
from fasttc.training.sharded import SHARED_OUT, ShardedTranscoder, group_of, summed

Steering = Literal["l0", "l1", "bias"] | None

REFRESH_DEAD = 8
"""Steps between two looks at which features are dead: each look waits for the device."""


INITIAL_L1 = 0.05
"""Where the steered weight of the L1 penalty starts: below what it takes (about 0.1, whatever the model)."""


@dataclass(frozen=True)
class Objective:
    """What a transcoder is trained on besides its reconstruction.

    Attributes:
        aux: weight of the AuxK loss (TopK activations only).
        k_aux: dead features used per token; None: half the output width.
        dead_after: a feature is dead when it has not been active for so many tokens.
        target_l0: mean number of active features to steer to, of every layer or one number per layer; None: no
            steering. How: see :meth:`TranscoderTask._choose_steering`.
        l1: weight of the decoder-norm-weighted L1 penalty; with ``target_l0`` only its start.
        l0: weight of the quadratic penalty on L0 / target (JumpReLU with trained thresholds).
        unit_decoder: keeps the decoder rows at norm one.
    """

    aux: float = 1 / 32
    k_aux: int | None = None
    dead_after: int = 10_000_000
    target_l0: float | tuple[float, ...] | None = None
    l1: float = 0.0
    l0: float = 1.0
    unit_decoder: bool = False


class Counters:
    """Tokens since each own feature of a layer was last active, and the features that counts as dead.

    Attributes:
        rows: of the own dead features; None where no process has any.
    """

    def __init__(self, transcoder: Transcoder) -> None:
        n, place = len(transcoder.W_enc), transcoder.W_enc.device
        self.since = torch.zeros(n, dtype=torch.int64, device=place)
        self.dead = torch.zeros(n, dtype=torch.bool, device=place)
        self.rows: Tensor | None = None
        self._group = group_of(transcoder)

    @torch.no_grad()
    def count(self, acts, n_tokens: int) -> None:
        on = (acts.values != 0).reshape(-1).float()
        fired = (
            torch.zeros_like(self.since, dtype=torch.float32).index_add_(0, acts.indices.reshape(-1), on) > 0
        )
        self.since = torch.where(fired, 0, self.since + n_tokens)

    def refresh(self, dead_after: int) -> None:
        self.dead = self.since > dead_after
        self.find_rows()

    def find_rows(self) -> None:
        count = self.dead.sum()
        self._group.add([count])
        self.rows = self.dead.nonzero()[:, 0] if count else None


class TranscoderTask:
    """Trains the transcoders of all layers, each on its own loss.

    Args:
        transcoders: changed in place; float32 (or float64).
        source: of activations.
        objective: see :class:`Objective`.
        scales: per layer, root mean squares of x and of y about its mean: see :func:`activation_scales`.
        numbers: of the transcoders among those of all processes, by which they are named in a checkpoint and find
            their target; None: 0, 1, ...
        parts: updates for each block, each on its share of the block's tokens.
        trained: names of the parameters to train, for every layer; None: all there are.
        decoder_scale: row norm to take for the decoder's rate; None: the one it has.
        bias_rate: factor on the rate of encoder biases.
        collect_after: from this update on the codes are added up for a closed-form decoder, in :attr:`sums`, as they
            pass; None: never.
        betas: of Adam.
        clip: largest gradient norm of a layer.

    The rate of every tensor is that of the schedule times the root mean square norm of the tensor's rows at the
    start (encoder, decoder, skip), or the size of the pre-activations or outputs (biases, thresholds): Adam moves
    every weight by about the rate whatever its size, so without this the result would depend on the units of x and y.
    """

    divergence = (10.0, 1.0)

    def __init__(
        self,
        transcoders: Sequence[Transcoder],
        source: Source,
        objective: Objective,
        scales: Sequence[tuple[float, float]],
        *,
        numbers: Sequence[int] | None = None,
        parts: int = 1,
        trained: Sequence[str] | None = None,
        decoder_scale: float | None = None,
        bias_rate: float = 1.0,
        collect_after: int | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float | None = 1.0,
    ) -> None:
        self.transcoders = list(transcoders)
        self.parts = parts
        self.numbers = list(range(len(self.transcoders)) if numbers is None else numbers)
        self._source = source
        self.processes = source.processes
        self._objective = objective
        self._counters = [Counters(t) for t in self.transcoders]
        self._l1 = [torch.tensor(float(objective.l1), device=t.W_enc.device) for t in self.transcoders]
        self._steering: list[Steering] = []
        self._steps = 0
        self._collect_after = collect_after
        self.sums = [] if collect_after is None else [DecoderSums(t) for t in self.transcoders]
        groups = []
        for i, transcoder, scale in zip(self.numbers, self.transcoders, scales, strict=True):
            transcoder.train()
            parameters = dict(transcoder.named_parameters())
            for name, parameter in parameters.items():
                parameter.requires_grad_(trained is None or name in trained)
            self._steering.append(self._choose_steering(transcoder))
            rates = rate_scales(transcoder, *scale)
            rates["W_dec"] = decoder_scale or rates["W_dec"]
            rates["b_enc"] *= bias_rate
            names = {
                name: stored_name(i, transcoder, name) for name, p in parameters.items() if p.requires_grad
            }
            kept = {stored: parameters[name] for name, stored in names.items()}
            factors = {stored: rates[name] for name, stored in names.items()}
            shared = [stored for stored in kept if SHARE in stored]
            groups.append(Group(kept, factors, shared, group_of(transcoder)))
        self.optimiser = Optimiser(groups, betas=betas, clip=clip)

    def split(self, batch: TokenBatch, step: int) -> list[tuple[list[Tensor], list[Tensor]]]:
        """(x, y) of all layers for every update: the block's tokens, mixed if there are several parts."""
        xs, ys = self._source.read(batch)
        if not xs:
            return [([], [])] * self.parts
        if len(xs[0]) < 2 * self.parts:
            raise ValueError(
                f"data: expected at least {2 * self.parts} usable tokens in a block, got {len(xs[0])}"
            )
        if self.parts == 1:
            return [(xs, ys)]
        order = torch.randperm(len(xs[0]), generator=torch.Generator().manual_seed(step))
        pieces = order.tensor_split(self.parts)
        return [([x[p.to(x.device)] for x in xs], [y[p.to(y.device)] for y in ys]) for p in pieces]

    def backward(self, part: tuple[list[Tensor], list[Tensor]]) -> dict[str, Tensor]:
        if self._steps % REFRESH_DEAD == 0 and self._objective.aux:
            for counters in self._counters:
                counters.refresh(self._objective.dead_after)
        rows: list[dict[str, Tensor]] = []
        for i, (x, y) in enumerate(zip(*part, strict=True)):
            loss, metrics = self._layer_loss(i, x, y)
            loss.backward()
            rows.append(metrics)
        if not rows:
            return {}
        device = rows[0]["fvu"].device
        columns = {name: torch.stack([row[name].to(device) for row in rows]) for name in rows[0]}
        return {"loss": columns["fvu"].mean(), **columns}

    def _layer_loss(self, i: int, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        transcoder, objective = self.transcoders[i], self._objective
        acts = transcoder.encode(x)
        prediction = transcoder.decode(acts, x)
        variance = losses.variance_sum(y)
        fvu = losses.normalised_mse(prediction, y, variance)
        group = group_of(transcoder)
        l0 = summed(acts.l0().mean(), group)
        loss = fvu
        if self._steering[i] == "l0":
            loss = loss + objective.l0 * losses.l0_distance(l0, self._target(i))
        elif self._steering[i] == "l1" or (objective.l1 > 0 and objective.target_l0 is None):
            scale = (variance / max(len(y), 1)).sqrt()
            loss = loss + self._l1[i] * summed(losses.l1(acts, transcoder.W_dec, scale), group)
        counters = self._counters[i]
        if objective.aux and counters.rows is not None and transcoder.activation in ("topk", "batchtopk"):
            k = objective.k_aux or max(1, transcoder.d_out // 2)
            dead = (transcoder.W_enc, transcoder.b_enc, transcoder.W_dec)
            W_enc, b_enc, W_dec = (parameter[counters.rows] for parameter in dead)
            loss = loss + objective.aux * losses.auxk(x, y - prediction, W_enc, b_enc, W_dec, k, group)
        counters.count(acts, len(x))
        if self._collect_after is not None and self._steps >= self._collect_after:
            self.sums[i].add(acts, x, y)
        dead = summed((counters.since > objective.dead_after).float().sum(), group) / transcoder.n_features
        return loss, {"fvu": fvu.detach(), "l0": l0.detach(), "dead": dead}

    def combine(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = self.processes.gather(columns)
        if len(parts) == 1:
            return columns
        names = ("fvu", "l0", "dead")
        whole = {name: torch.cat([part[name] for part in parts if part], 1) for name in names}
        return {"loss": whole["fvu"].mean(1), **whole}

    def _target(self, i: int) -> float:
        target = self._objective.target_l0
        return target[self.numbers[i]] if isinstance(target, tuple) else float(target or 0)

    def _choose_steering(self, transcoder: Transcoder) -> Steering:
        """By what L0 is held: TopK by its k, JumpReLU by its thresholds or else its biases, ReLU by an L1 penalty."""
        if self._objective.target_l0 is None or transcoder.activation in ("topk", "batchtopk"):
            return None
        if transcoder.threshold is not None and transcoder.threshold.requires_grad:
            return "l0"
        if not transcoder.b_enc.requires_grad:  # the encoder is frozen, and L0 with it
            return None
        return "bias" if transcoder.activation == "jumprelu" else "l1"

    @torch.no_grad()
    def after_update(self, metrics: dict[str, Tensor]) -> None:
        self._steps += 1
        for i, transcoder in enumerate(self.transcoders):
            if self._objective.unit_decoder:
                transcoder.W_dec /= transcoder.W_dec.norm(dim=1, keepdim=True)
            if transcoder.activation == "jumprelu" and transcoder.threshold is not None:
                transcoder.threshold.clamp_(min=0)
            if self._steering[i] == "l1":
                self._l1[i] = steer(self._l1[i], metrics["l0"][i], self._target(i))
            elif self._steering[i] == "bias":
                missing = (self._target(i) / metrics["l0"][i].to(transcoder.b_enc)).clamp(0.2, 5.0).log()
                name = stored_name(self.numbers[i], transcoder, "b_enc")
                transcoder.b_enc.add_(0.1 * self.optimiser.scale(name) * missing)

    def divided(self, name: str) -> bool:
        """Every process has layers of its own, or rows of features of all layers and the same of everything else."""
        return SHARE in name or not any(isinstance(t, ShardedTranscoder) for t in self.transcoders)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for i, n in enumerate(self.numbers):
            tensors |= {f"{n}.buffer.{name}": t for name, t in self.transcoders[i].named_buffers()}
            tensors |= {
                self._counted(i, name): getattr(self._counters[i], name) for name in ("since", "dead")
            }
            tensors[f"{n}.l1"] = self._l1[i]
        for n, sums in zip(self.numbers, self.sums, strict=False):
            tensors |= {f"{n}.sums.{name}": t for name, t in sums.state().items()}
        return tensors, {"steps": self._steps}

    def _counted(self, i: int, name: str) -> str:
        """What the counter of a layer's features is called in a checkpoint."""
        return (
            f"{self.numbers[i]}{SHARE if isinstance(self.transcoders[i], ShardedTranscoder) else '.'}{name}"
        )

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        self._steps = values["steps"]
        for i, n in enumerate(self.numbers):
            counters = self._counters[i]
            for name, buffer in self.transcoders[i].named_buffers():
                buffer.copy_(tensors[f"{n}.buffer.{name}"])
            for name in ("since", "dead"):
                counted = getattr(counters, name)
                setattr(counters, name, tensors[self._counted(i, name)].to(counted.device))
            counters.find_rows()
            self._l1[i] = tensors[f"{n}.l1"].to(self._l1[i].device)
        for n, sums in zip(self.numbers, self.sums, strict=False):  # none, unless there will be a refit
            prefix = f"{n}.sums."
            sums.restore(
                {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            )


def stored_name(number: int, transcoder: Transcoder, name: str) -> str:
    """What a parameter of layer ``number`` is called in a checkpoint."""
    shared = isinstance(transcoder, ShardedTranscoder) and name in SHARED_OUT
    return f"{number}{SHARE}{name}" if shared else f"{number}.{name}"


def steer(weight: Tensor, l0: Tensor, target: float, gain: float = 0.3) -> Tensor:
    """The penalty's next weight: multiplied by ``(l0 / target) ** gain``, so that it settles where L0 is the target."""
    factor = (l0.to(weight.device) / target).clamp(0.1, 10.0) ** gain
    return (weight * factor).clamp(1e-6, 1e3)


@torch.no_grad()
def activation_scales(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Root mean square of x [N, D], and of y [N, D_out] about its mean; 1 where that would be 0."""
    y_scale = (y - y.mean(0)).square().mean().sqrt()
    return float(x.square().mean().sqrt()) or 1.0, float(y_scale) or 1.0


@torch.no_grad()
def rate_scales(transcoder: Transcoder, x_scale: float, y_scale: float) -> dict[str, float]:
    """Factors on the learning rate by parameter name; see :class:`TranscoderTask`."""

    group = group_of(transcoder)

    def row_norm(weight: Tensor) -> float:
        squares = weight.norm(dim=1).double().square().sum()
        group.add([squares])
        return math.sqrt(float(squares) / transcoder.n_features)

    encoder, decoder = row_norm(transcoder.W_enc), row_norm(transcoder.W_dec)
    return {
        "W_enc": encoder,
        "b_enc": encoder * x_scale,
        "threshold": encoder * x_scale,
        "W_dec": decoder,
        "b_dec": y_scale,
        "W_skip": y_scale / x_scale,
    }
