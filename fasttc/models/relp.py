"""A dense MLP on one prompt as a linear map, by the rules of RelP (Jafari et al. 2025, used by arXiv 2602.20904).

    activation:   act(g)     becomes  g · (act(g) / g)          with the quotient held constant
    product:      gate · up  becomes  ½ gate · (up) + ½ (gate) · up   with what stands in brackets held constant

So each hidden unit's output is shared out in full, and the map is linear in the MLP's input.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttc.models.linear import _matrix


@dataclass(frozen=True)
class LinearMlp:
    """``out[t] = (Σ_b factor_b[t] ∘ (into_b x[t])) down^T``, without the constants that biases leave.

    Attributes:
        branches: per branch (gate and up, or the only one), ``into [I, D]`` and ``factor [T, I]``.
        down: ``[D_out, I]``.
    """

    branches: tuple[tuple[Tensor, Tensor], ...]
    down: Tensor

    def apply(self, x: Tensor, first: int = 0) -> Tensor:
        """``[P, n, D]`` at positions ``first``, ... through the map, ``[P, n, D_out]``."""
        hidden = x.new_zeros(*x.shape[:-1], self.down.shape[1])
        for into, factor in self.branches:
            hidden += (x @ into.T) * factor[first : first + len(x), None]
        return hidden @ self.down.T

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Gradient ``[P, n, D_out]`` at the output of positions 0, ..., pulled back to the input ``[P, n, D]``."""
        hidden = gradient @ self.down
        back = torch.zeros_like(gradient)
        for into, factor in self.branches:
            back += (hidden * factor[: len(gradient), None]) @ into
        return back


@torch.no_grad()
def linear_mlp(mlp: nn.Module, x: Tensor, dtype: torch.dtype) -> LinearMlp:
    """The map of ``mlp`` at inputs ``x [T, D]``, in ``dtype``.

    Raises:
        ValueError: an MLP of an unknown form.
    """
    parts: Any = mlp
    names = dict(mlp.named_children())
    place = next(mlp.parameters())
    x = x.to(place)
    if {"gate_proj", "up_proj", "down_proj"} <= names.keys():
        gate, up = parts.gate_proj(x), parts.up_proj(x)
        act = parts.act_fn
        into = [_matrix(parts.gate_proj, x.shape[-1]), _matrix(parts.up_proj, x.shape[-1])]
        factors, down = [up * _quotient(act, gate) / 2, act(gate) / 2], parts.down_proj
    else:
        found = [name for name in ("c_fc", "dense_h_to_4h") if name in names]
        if not found:
            raise ValueError(
                f"mlp: expected a gated or a plain MLP of a supported family, got {sorted(names)}"
            )
        entry: Any = names[found[0]]
        exit_: Any = names["c_proj" if found[0] == "c_fc" else "dense_4h_to_h"]
        into = [_matrix(entry, x.shape[-1])]
        factors, down = [_quotient(parts.act, entry(x))], exit_
    matrix = _matrix(down, factors[0].shape[-1])
    branches = tuple((w.detach().to(dtype), f.to(dtype)) for w, f in zip(into, factors, strict=True))
    return LinearMlp(branches, matrix.detach().to(dtype))


def _quotient(act: Any, z: Tensor) -> Tensor:
    """``act(z) / z``; at 0 what it is just beside it."""
    beside = torch.where(z == 0, torch.finfo(z.dtype).tiny ** 0.5, z)
    return act(beside) / beside
