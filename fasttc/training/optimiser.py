"""Adam over float32 masters with a rate per tensor, clipping by group, and a state that is plain tensors."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fasttc.training.distributed import Processes

Decay = Literal["cosine", "linear", "constant"]
Kind = Literal["adamw", "adamw8bit"]


def schedule(step: int, steps: int, warmup: int, decay: str) -> float:
    """Factor on the learning rate at ``step`` (from 0) of ``steps``: linear warm-up, then decay towards zero.

    "cosine" and "linear" reach zero after the last step, "constant" stays at one.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if decay == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 1 - done if decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Group:
    """Parameters clipped together.

    Attributes:
        parameters: by name; the names are those of the optimiser's state.
        scales: factor on the learning rate by name, 1 where absent. The gradient norm that is clipped is that of
            the scaled parameters, so that it does not depend on the units of the activations.
        shared: names of those of which this process has some rows and ``processes`` have the others.
    """

    parameters: Mapping[str, Tensor]
    scales: dict[str, float] = field(default_factory=dict)
    shared: Collection[str] = ()
    processes: Processes = field(default_factory=Processes)

    def squared_norm(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Of the gradients by name, scaled, with the rows of all processes: a scalar, the same on all of them."""
        place = next(iter(grads.values())).device
        squares = {n: (g.norm() * self.scales.get(n, 1.0)).square().to(place) for n, g in grads.items()}
        zero = torch.zeros_like(next(iter(squares.values())))
        shared = torch.stack([zero, *(s for n, s in squares.items() if n in self.shared)]).sum()
        self.processes.add([shared])
        return torch.stack([shared, *(s for n, s in squares.items() if n not in self.shared)]).sum()


class Optimiser:
    """Adam (decoupled weight decay) for several groups. Deterministic; never waits for the device.

    Parameters of lower precision get float32 masters: gradients are added up there, the step is taken there, and the
    result is rounded back.

    Args:
        groups: see :class:`Group`.
        kind: "adamw" of torch, or "adamw8bit" of bitsandbytes, which keeps its averages in blocks of 8-bit numbers.
        betas, eps, weight_decay: of Adam.
        clip: largest gradient norm of a group; 0 or None: no clipping.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        kind: Kind = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
    ) -> None:
        self._groups = groups
        self._clip = clip
        self._masters: dict[str, Tensor] = {}
        param_groups = []
        for group in groups:
            for name, parameter in group.parameters.items():
                same = parameter.dtype in (torch.float32, torch.float64)
                self._masters[name] = parameter if same else parameter.detach().float()
                scale = group.scales.get(name, 1.0)
                param_groups.append({"params": [self._masters[name]], "scale": scale})
        self._fused = {t.device.type for t in self._masters.values()} <= {"cpu", "cuda"}
        # An optimiser of nothing is that of a process without a layer of its own.
        param_groups = param_groups or [{"params": [], "scale": 1.0}]
        options: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if kind == "adamw8bit":
            self._adam: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(param_groups, **options)
        else:
            options["fused" if self._fused else "foreach"] = True
            self._adam = torch.optim.AdamW(param_groups, **options)

    def scale(self, name: str) -> float:
        """Factor on the learning rate of a parameter."""
        return next(group.scales.get(name, 1.0) for group in self._groups if name in group.parameters)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients of parameters of lower precision to those of their masters, and drops them."""
        for group in self._groups:
            for name, parameter in group.parameters.items():
                master = self._masters[name]
                if master is not parameter and parameter.grad is not None:
                    grad = parameter.grad.float()
                    master.grad = grad if master.grad is None else master.grad.add_(grad)
                    parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """What has been collected, in an order that does not change."""
        self.collect()
        return [master.grad for master in self._masters.values() if master.grad is not None]

    def step(self, lr: float) -> None:
        """One update with the gradients that are there; drops them."""
        self.collect()
        for group in self._groups:
            if self._clip:
                self._clip_group(group, self._clip)
        for param_group in self._adam.param_groups:
            param_group["lr"] = lr * param_group["scale"]
        self._adam.step()
        for group in self._groups:
            for name, parameter in group.parameters.items():
                master = self._masters[name]
                if master is not parameter:
                    parameter.detach().copy_(master)
                master.grad = None

    @torch.no_grad()
    def _clip_group(self, group: Group, clip: float) -> None:
        found = {name: self._masters[name].grad for name in group.parameters}
        grads = {name: grad for name, grad in found.items() if grad is not None}
        if grads:
            factor = (clip / (group.squared_norm(grads).sqrt() + 1e-12)).clamp(max=1.0)
            for grad in grads.values():
                grad.mul_(factor.to(grad.device))

    @property
    def finite(self) -> bool:
        """Whether every weight that is trained is a finite number."""
        return all(bool(master.isfinite().all()) for master in self._masters.values())

    def state(self) -> dict[str, Tensor]:
        """All tensors of the optimiser by name, masters included."""
        tensors: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            tensors[f"{name}.master"] = master.detach()
            for key, value in self._adam.state.get(master, {}).items():
                tensors[f"{name}.{key}"] = torch.as_tensor(value)  # bitsandbytes counts steps in an int
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over a state, and writes the masters to the parameters."""
        stored: dict[str, list[str]] = {}
        for whole in tensors:
            name, _, key = whole.rpartition(".")
            stored.setdefault(name, []).append(key)
        for group in self._groups:
            for name, parameter in group.parameters.items():
                master = self._masters[name]
                master.copy_(tensors[f"{name}.master"])
                if master is not parameter:
                    parameter.copy_(master)
                state = self._adam.state[master] = {}
                for key in stored[name]:
                    if key != "master":
                        value = tensors[f"{name}.{key}"]
                        counts = value.dim() == 0 and not value.is_floating_point()
                        on_device = self._fused or key != "step"  # where AdamW itself keeps the count
                        moved = value.to(master.device if on_device else "cpu").clone()
                        state[key] = int(value) if counts else moved


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("optimiser: 'adamw8bit' needs bitsandbytes: pip install bitsandbytes") from None
    return bitsandbytes


def check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"optimiser: expected one of {', '.join(get_args(Kind))}, got {kind!r}")


def check_schedule(decay: str) -> None:
    if decay not in get_args(Decay):
        raise ValueError(f"decay: expected one of {', '.join(get_args(Decay))}, got {decay!r}")
