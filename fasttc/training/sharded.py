"""A transcoder whose features are shared out over processes: for F that one device cannot hold.

Nothing of size F ever travels. JumpReLU and ReLU decide feature by feature. With TopK every process offers the K best
of its own features, all gather the candidates' values ([N, K] of each) and pick the same K of them. Every process
decodes the winners that are its own, and the partial outputs are added up. Gradients need no exchange but that of x:
every process computes the same loss from the same sum.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fasttc import ops
from fasttc.nn import Transcoder
from fasttc.nn.transcoder import TranscoderConfig
from fasttc.ops import SparseActs
from fasttc.ops._torch import select_topk
from fasttc.training.distributed import Processes, processes

SHARED_OUT = ("W_enc", "b_enc", "W_dec", "threshold")
"""Parameters with a row for every feature; the others every process has whole."""


class ShardedTranscoder(Transcoder):
    """Stands where a :class:`fasttc.Transcoder` stands; all processes call it together, with the same x.

    Equal to the transcoder that holds all features but for rounding (partial outputs are added in another order).
    Bitwise the same from run to run with the same number of processes, and on all of them.

    Parameters are those of a transcoder with the rows of this process's features alone, :meth:`Processes.share` of all
    F. ``config`` and ``n_features`` are of the whole. What :meth:`encode` gives, and :meth:`decode` takes, are the
    active features among the own ones, counted from ``first``.

    Args:
        config: of the whole.
        group: the processes; those of this run, unless given.
        dtype, device: of the parameters, which are drawn as those of a new transcoder.

    Raises:
        ValueError: BatchTopK, which selects over features and tokens at once; fewer features than processes.
    """

    def __init__(
        self,
        config: TranscoderConfig,
        group: Processes | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        group = processes() if group is None else group
        if config.activation == "batchtopk":
            raise ValueError(
                "activation: expected topk, jumprelu or relu for shared-out features, got 'batchtopk'"
            )
        if config.n_features < group.size:
            raise ValueError(
                f"n_features: expected a feature for each of {group.size} processes, got {config.n_features}"
            )
        own = group.share(config.n_features)
        rows = own.stop - own.start
        local: dict[str, Any] = config.to_dict() | {"n_features": rows}
        if config.k is not None:
            local["k"] = min(config.k, rows)
        super().__init__(**local, dtype=dtype, device=device)
        self.config, self.group, self.first = config, group, own.start

    @classmethod
    def from_config(
        cls, config: TranscoderConfig, *, dtype: torch.dtype | None = None
    ) -> "ShardedTranscoder":
        """This process's share of a new one of this configuration."""
        return cls(config, dtype=dtype)

    @classmethod
    def of(cls, whole: Transcoder, group: Processes | None = None) -> "ShardedTranscoder":
        """The share of a transcoder that every process holds whole, as a copy."""
        place = whole.W_enc.device
        sharded = cls(whole.config, group, dtype=whole.W_enc.dtype, device="meta").to_empty(device=place)
        own = sharded.group.share(whole.n_features)
        state = whole.state_dict()
        sharded.load_state_dict({n: t[own] if n in SHARED_OUT else t for n, t in state.items()})
        return sharded

    def encode(self, x: Tensor, *, impl: str = "auto") -> SparseActs:
        """Active features of ``x [..., D]`` among the own ones, as CSR.

        With TopK those of the K largest of all F, ties to the lower index as in :func:`fasttc.ops.encode`. The
        gradient of x is complete.
        """
        x = _Enter.apply(x.to(self.W_enc.dtype), self.group)
        if self.config.k is None:
            return super().encode(x, impl=impl)
        k = min(self.config.k, len(self.W_enc))
        offered = ops.encode(x, self.W_enc, self.b_enc, k=k, relu=False, impl=impl)
        won = winners(offered.values.detach(), self.config.k, self.group)
        counts = won.sum(1)
        row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        values = offered.values[won].relu() if self.config.relu else offered.values[won]
        return SparseActs(values, offered.indices[won], len(self.W_enc), offered.shape, row_ptr)

    def decode(self, acts: SparseActs, x: Tensor | None = None, *, impl: str = "auto") -> Tensor:
        """``[..., D_out]`` in the parameters' dtype, the same on all processes.

        Args:
            acts: of :meth:`encode`.
            x: the encoder's input, needed with a skip connection only.

        Raises:
            ValueError: a skip transcoder without ``x``.
        """
        part = ops.decode(acts, self.W_dec, impl=impl)
        if (
            acts.values.numel() == 0
        ):  # so that on the way back this process, too, gets to where the others wait
            part = part + acts.values.sum()
        y = summed(part, self.group) + self.b_dec
        if self.W_skip is not None:
            if x is None:
                raise ValueError(
                    "x: expected the encoder's input (this transcoder has a skip connection), got None"
                )
            y = y + x.to(self.W_skip.dtype) @ self.W_skip.T
        return y.to(self.W_dec.dtype)

    def whole(self) -> Transcoder:
        """All features in one transcoder, on the CPU of every process: for what one machine can hold."""
        states = self.group.gather({name: t.detach().cpu() for name, t in self.state_dict().items()})
        whole = Transcoder(**self.config.to_dict(), dtype=self.W_enc.dtype, device="meta")
        whole = whole.to_empty(device="cpu")
        whole.load_state_dict(
            {n: torch.cat([s[n] for s in states]) if n in SHARED_OUT else t for n, t in states[0].items()}
        )
        return whole


def group_of(transcoder: Transcoder) -> Processes:
    """The processes that share out the features of a transcoder; this one alone for an ordinary transcoder."""
    return transcoder.group if isinstance(transcoder, ShardedTranscoder) else Processes()


def winners(values: Tensor, k: int, group: Processes) -> Tensor:
    """Which candidates [N, K'] of this process, K' <= k, are among the k largest of all processes': bool [N, K'].

    By (value, lower rank, earlier place). All processes call it together; their K' may differ.
    """
    if group.size == 1:
        return torch.ones_like(values, dtype=torch.bool)
    room = (0, k - values.shape[1])  # whoever has fewer is filled up with what never wins
    candidates = torch.cat(group.collect(nn.functional.pad(values, room, value=-torch.inf)), 1)
    won = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, select_topk(candidates, k), True)
    return won[:, group.rank * k : group.rank * k + values.shape[1]]


def summed(part: Tensor, group: Processes) -> Tensor:
    """The sum over processes, whose gradient every process has already: what follows is the same on all of them."""
    return part if group.size == 1 else _Sum.apply(part, group)  # type: ignore[return-value]


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
    """The sum over processes; its gradient is already the same on all of them."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Processes) -> Tensor:
        whole = part.clone()
        group.add([whole])
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
