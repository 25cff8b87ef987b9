"""Held-out quality while training: keeps the best weights, and says when they get no better."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Watch:
    """Looks at a held-out figure every so many steps; lower is better.

    Args:
        every: steps between two looks.
        patience: looks without a new best after which training should stop.
        measure: gives the figure of the weights as they are.
        tensors: what is kept of the best look: parameters and buffers (a copy of each, on their device).
    """

    def __init__(
        self, every: int, patience: int, measure: Callable[[], float], tensors: Mapping[str, Tensor]
    ) -> None:
        self.every, self._patience, self._measure, self._tensors = every, patience, measure, tensors
        self.best, self.best_step, self._worse = math.inf, 0, 0
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self, step: int) -> bool:
        """True when it is time to stop."""
        found = self._measure()
        if found < self.best:
            self.best, self.best_step, self._worse = found, step, 0
            for name, tensor in self._tensors.items():  # one by one: never two copies of everything
                self._kept[name] = tensor.detach().clone()
        else:
            self._worse += 1
        return self._worse >= self._patience

    @torch.no_grad()
    def put_back(self) -> bool:
        """Writes what was kept to where it came from; False when no look has been taken."""
        for name, kept in self._kept.items():
            self._tensors[name].copy_(kept)
        return math.isfinite(self.best)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values."""
        best = None if math.isinf(self.best) else self.best
        return self._kept, {"best": best, "best_step": self.best_step, "worse": self._worse}

    def restore(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        """Takes over a state."""
        self.best = math.inf if values["best"] is None else values["best"]
        self.best_step, self._worse = values["best_step"], values["worse"]
        self._kept = {name: t.to(self._tensors[name].device) for name, t in tensors.items()}
