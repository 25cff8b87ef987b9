"""A transcoder whose features are shared out over processes: for F that one device cannot hold.

With TopK nothing of size F ever travels. Every process encodes with its own features and keeps its K best; all gather
the candidates ([N, K] values and indices of each) and pick the same K of them; every process decodes the winners that
are its own, and the partial outputs are added up. Gradients need no exchange but that of x: every process computes the
same loss from the same sum.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fasttc import ops
from fasttc.nn import Transcoder
from fasttc.ops import SparseActs
from fasttc.ops._torch import select_topk
from fasttc.training.distributed import Processes, processes

_SHARED_OUT = ("W_enc", "b_enc", "W_dec")


class ShardedTranscoder(nn.Module):
    """Stands where a TopK :class:`fasttc.Transcoder` stands; all processes call it together, with the same x.

    Equal to the transcoder that holds all features but for rounding (partial outputs are added in another order).
    Bitwise the same from run to run with the same number of processes, and on all of them.

    Args:
        local: this process's features, :meth:`Processes.share` of all of them, with the whole ``b_dec`` (and
            ``W_skip``), the same on all processes. Its own k is not used.
        n_features: F, of all processes.
        k: active features per token, of all F.
        group: the processes; those of this run, unless given.

    Raises:
        ValueError: an activation other than TopK; a local part that is not this process's share; fewer features than
            processes or than k.
    """

    def __init__(self, local: Transcoder, n_features: int, k: int, group: Processes | None = None) -> None:
        super().__init__()
        self.group = processes() if group is None else group
        self.n_features = n_features
        self.k = k
        own = self.group.share(n_features)
        if local.activation != "topk":
            raise ValueError(f"activation: expected 'topk' for shared-out features, got {local.activation!r}")
        _check_sizes(n_features, k, self.group)
        if local.n_features != own.stop - own.start:
            raise ValueError(
                f"local: expected {own.stop - own.start} of {n_features} features for process {self.group.rank} of "
                f"{self.group.size}, got {local.n_features}"
            )
        self.local = local
        self.first = own.start

    @classmethod
    def of(cls, whole: Transcoder, group: Processes | None = None) -> "ShardedTranscoder":
        """The share of a transcoder that every process holds whole, as a copy."""
        group = processes() if group is None else group
        _check_sizes(whole.n_features, whole.k or 1, group)
        own = group.share(whole.n_features)
        config: dict[str, Any] = whole.config.to_dict() | {"n_features": own.stop - own.start}
        if whole.k is not None:
            config["k"] = min(whole.k, config["n_features"])
        local = Transcoder(**config, dtype=whole.W_enc.dtype, device="meta").to_empty(
            device=whole.W_enc.device
        )
        state = whole.state_dict()
        local.load_state_dict({n: t[own] if n in _SHARED_OUT else t for n, t in state.items()})
        return cls(local, whole.n_features, whole.k or 0, group)

    def encode(self, x: Tensor) -> SparseActs:
        """Active features of ``x [..., D]``: indices among all F, the same on all processes.

        Ties go to the lower index, as in :func:`fasttc.ops.encode`. Of the values, those of own features carry a
        gradient; that of x is complete.
        """
        local = self.local
        x = x.to(local.W_enc.dtype).reshape(-1, local.d_in) if x.dim() != 2 else x.to(local.W_enc.dtype)
        k = min(self.k, local.n_features)
        acts = ops.encode(_Enter.apply(x, self.group), local.W_enc, local.b_enc, k=k, relu=False)
        room = (
            0,
            self.k - k,
        )  # a process with fewer than k features offers no more: filled up with what never wins
        values = nn.functional.pad(acts.values, room, value=-torch.inf)
        indices = nn.functional.pad(acts.indices + self.first, room)
        offers = self.group.collect(values.detach())
        offers[self.group.rank] = values
        candidates = torch.cat(offers, 1)
        chosen = select_topk(candidates.detach(), self.k)  # in order of process and index: of index
        indices = torch.cat(self.group.collect(indices), 1).gather(1, chosen)
        values = candidates.gather(1, chosen)
        values = values.relu() if local.config.relu else values
        return SparseActs(values, indices, self.n_features, (len(x),))

    def decode(self, acts: SparseActs, x: Tensor | None = None) -> Tensor:
        """``[N, D_out]`` in the parameters' dtype, the same on all processes.

        Args:
            acts: of :meth:`encode`.
            x: the encoder's input, needed with a skip connection only.

        Raises:
            ValueError: a skip transcoder without ``x``.
        """
        own = (acts.indices >= self.first) & (acts.indices < self.first + self.local.n_features)
        counts = own.sum(1)
        row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        mine = SparseActs(
            acts.values[own], acts.indices[own] - self.first, self.local.n_features, acts.shape, row_ptr
        )
        y = _Sum.apply(ops.decode(mine, self.local.W_dec), acts.values, self.group) + self.local.b_dec
        if self.local.W_skip is not None:
            if x is None:
                raise ValueError(
                    "x: expected the encoder's input (this transcoder has a skip connection), got None"
                )
            y = y + x.to(self.local.W_skip.dtype).reshape(-1, self.local.d_in) @ self.local.W_skip.T
        return y.to(self.local.W_dec.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D_out]`` in the dtype of ``x``."""
        return self.decode(self.encode(x), x).reshape(*x.shape[:-1], self.local.d_out).to(x.dtype)

    def whole(self) -> Transcoder:
        """All features in one transcoder, on the CPU of every process: for saving what one machine can hold."""
        states = self.group.gather({name: t.detach().cpu() for name, t in self.local.state_dict().items()})
        config: dict[str, Any] = self.local.config.to_dict() | {"n_features": self.n_features, "k": self.k}
        whole = Transcoder(**config, dtype=self.local.W_enc.dtype, device="meta").to_empty(device="cpu")
        whole.load_state_dict(
            {n: torch.cat([s[n] for s in states]) if n in _SHARED_OUT else t for n, t in states[0].items()}
        )
        return whole


def _check_sizes(n_features: int, k: int, group: Processes) -> None:
    if not max(k, group.size) <= n_features:
        raise ValueError(
            f"n_features: expected at least k = {k} and a feature for each of {group.size} processes, got {n_features}"
        )


class _Enter(torch.autograd.Function):
    """x as it is; its gradient is the sum of what the processes' features have on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Processes) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        ctx.group.add([grad])
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is already the same on all of them.

    The values are only passed through: a process of which no feature won must reach :class:`_Enter` on the way back
    too, where the others wait for it.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, values: Tensor, group: Processes) -> Tensor:
        ctx.save_for_backward(values)
        whole = part.clone()
        group.add([whole])
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.zeros_like(ctx.saved_tensors[0]), None
