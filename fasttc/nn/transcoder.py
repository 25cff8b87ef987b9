"""Transcoder: a wide, sparse stand-in for one MLP."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fasttc import ops
from fasttc.ops import SparseActs
from fasttc.ops.reference import compute_dtype, pre_activations

Activation = Literal["topk", "batchtopk", "jumprelu", "relu"]


@dataclass(frozen=True)
class TranscoderConfig:
    """Shape and activation of a transcoder; everything but its weights.

    Attributes:
        d_in: width of the input.
        n_features: F.
        d_out: width of the output.
        activation: "topk" and "batchtopk" (with ``k``), "jumprelu", "relu".
        k: active features per token, for the two TopK activations; None for the others.
        skip: whether a linear path ``x W_skip^T`` is added to the output.
        relu: whether TopK values pass a ReLU (circuit-tracer's TopK does not).
        bandwidth: width of the rectangle kernel through which a JumpReLU threshold learns.
    """

    d_in: int
    n_features: int
    d_out: int
    activation: Activation = "topk"
    k: int | None = None
    skip: bool = False
    relu: bool = True
    bandwidth: float = 0.1

    def __post_init__(self) -> None:
        for name in ("d_in", "n_features", "d_out"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a positive int, got {size!r}")
        if self.activation not in get_args(Activation):
            expected = ", ".join(get_args(Activation))
            raise ValueError(f"activation: expected one of {expected}, got {self.activation!r}")
        if self.activation in ("topk", "batchtopk"):
            if isinstance(self.k, bool) or not isinstance(self.k, int):
                raise ValueError(
                    f"k: expected a positive int for activation {self.activation!r}, got {self.k!r}"
                )
            if not 1 <= self.k <= self.n_features:
                raise ValueError(f"k: expected 1 <= k <= n_features = {self.n_features}, got {self.k}")
        elif self.k is not None:
            raise ValueError(f"k: expected None for activation {self.activation!r}, got {self.k!r}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth: expected a number > 0, got {self.bandwidth!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TranscoderConfig":
        try:
            return cls(**content)
        except TypeError as error:
            expected = list(cls.__dataclass_fields__)
            raise ValueError(
                f"transcoder configuration: expected the fields {expected}, got {content}"
            ) from error


class Transcoder(nn.Module):
    """``y = act(x W_enc^T + b_enc) W_dec + b_dec (+ x W_skip^T)`` with sparse ``act``.

    Args:
        d_in: D, width of the input.
        n_features: F.
        d_out: width of the output; D when None.
        activation: "topk", "batchtopk", "jumprelu" or "relu".
        k: active features per token (TopK activations only; ignored by the others).
        skip: adds a linear path, initialised to zero.
        relu: whether TopK values pass a ReLU.
        bandwidth: of the JumpReLU threshold's gradient.
        dtype, device: of the parameters.

    Parameters: ``W_enc [F, D]``, ``b_enc [F]``, ``W_dec [F, D_out]``, ``b_dec [D_out]``, for JumpReLU
    ``threshold [F]``, with a skip ``W_skip [D_out, D]``. BatchTopK has a scalar buffer ``threshold``, the running
    mean of the smallest kept value: in training mode it selects ``N·k`` values of the batch, in evaluation mode it
    is a JumpReLU with that threshold, so that a token's features do not depend on its neighbours.

    Initial weights: decoder rows of unit norm; encoder rows equal to them where the widths agree.
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        d_out: int | None = None,
        activation: Activation = "topk",
        k: int | None = 32,
        skip: bool = False,
        *,
        relu: bool = True,
        bandwidth: float = 0.1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        uses_k = activation in ("topk", "batchtopk")
        self.config = TranscoderConfig(
            d_in,
            n_features,
            d_in if d_out is None else d_out,
            activation,
            k if uses_k else None,
            skip,
            relu,
            bandwidth,
        )
        make = {"dtype": dtype, "device": device}
        cfg = self.config
        self.W_enc = nn.Parameter(torch.empty(cfg.n_features, cfg.d_in, **make))
        self.b_enc = nn.Parameter(torch.zeros(cfg.n_features, **make))
        self.W_dec = nn.Parameter(torch.empty(cfg.n_features, cfg.d_out, **make))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out, **make))
        self.W_skip = nn.Parameter(torch.zeros(cfg.d_out, cfg.d_in, **make)) if skip else None
        self.threshold: Tensor | None
        if activation == "jumprelu":
            self.threshold = nn.Parameter(torch.full((cfg.n_features,), cfg.bandwidth, **make))
        elif activation == "batchtopk":
            self.register_buffer("threshold", torch.zeros((), **make))
        else:
            self.threshold = None
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: TranscoderConfig, *, dtype: torch.dtype | None = None) -> "Transcoder":
        """A new one of this configuration."""
        return cls(**config.to_dict(), dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new random weights from the global generator; biases zero."""
        if self.W_enc.is_meta:
            return
        cfg = self.config
        self.W_dec.normal_()
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        if cfg.d_in == cfg.d_out:
            self.W_enc.copy_(self.W_dec)
        else:
            self.W_enc.normal_(std=cfg.d_in**-0.5)
        self.b_enc.zero_()
        self.b_dec.zero_()

    @property
    def d_in(self) -> int:
        return self.config.d_in

    @property
    def d_out(self) -> int:
        return self.config.d_out

    @property
    def n_features(self) -> int:
        return self.config.n_features

    @property
    def activation(self) -> Activation:
        return self.config.activation

    @property
    def k(self) -> int | None:
        return self.config.k

    @property
    def skip(self) -> bool:
        return self.config.skip

    def encode(self, x: Tensor, *, impl: str = "auto") -> SparseActs:
        """Active features of ``x [..., D]``. See :func:`fasttc.ops.encode`."""
        x = x.to(self.W_enc.dtype) if x.dtype != self.W_enc.dtype else x
        cfg = self.config
        if cfg.activation == "topk" or (cfg.activation == "batchtopk" and self.training):
            scope = "batch" if cfg.activation == "batchtopk" else "token"
            acts = ops.encode(x, self.W_enc, self.b_enc, k=cfg.k, scope=scope, relu=cfg.relu, impl=impl)
            if scope == "batch":
                self._track_threshold(acts)
            return acts
        theta = 0.0 if self.threshold is None else self.threshold
        learns = cfg.activation == "jumprelu" and self.training and torch.is_grad_enabled()
        bandwidth = cfg.bandwidth if learns else None
        return ops.encode(x, self.W_enc, self.b_enc, threshold=theta, bandwidth=bandwidth, impl=impl)

    @torch.no_grad()
    def _track_threshold(self, acts: SparseActs, decay: float = 0.99) -> None:
        positive = acts.values[acts.values > 0]
        if positive.numel():
            assert self.threshold is not None, "batchtopk has a threshold buffer"
            smallest = positive.min().to(self.threshold.dtype)
            # The first batch sets the threshold; later ones move it slowly.
            self.threshold.copy_(
                torch.where(self.threshold == 0, smallest, decay * self.threshold + (1 - decay) * smallest)
            )

    def decode(self, acts: SparseActs, x: Tensor | None = None, *, impl: str = "auto") -> Tensor:
        """``[..., D_out]`` in the parameters' dtype.

        Args:
            acts: sparse activations.
            x: the encoder's input, needed with a skip connection only.

        Raises:
            ValueError: a skip transcoder without ``x``.
        """
        init = None
        if self.W_skip is not None:
            if x is None:
                raise ValueError(
                    "x: expected the encoder's input (this transcoder has a skip connection), got None"
                )
            init = x.to(self.W_skip.dtype) @ self.W_skip.T
        return ops.decode(acts, self.W_dec, self.b_dec, init=init, impl=impl).to(self.W_dec.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D_out]`` in the dtype of ``x``."""
        return self.decode(self.encode(x), x).to(x.dtype)

    def pre_activations(self, x: Tensor) -> Tensor:
        """Dense ``x W_enc^T + b_enc [..., F]``: for inspection; encode never needs it whole."""
        z = pre_activations(x.reshape(-1, self.d_in).to(compute_dtype(x)), self.W_enc, self.b_enc)
        return z.reshape(*x.shape[:-1], len(self.W_enc))

    def extra_repr(self) -> str:
        cfg = self.config
        sparsity = f", k={cfg.k}" if cfg.k else ""
        skip = ", skip" if cfg.skip else ""
        return f"{cfg.d_in} -> {cfg.n_features} -> {cfg.d_out}, {cfg.activation}{sparsity}{skip}"
