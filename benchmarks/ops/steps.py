"""One training step of a TopK transcoder (encode, decode, squared error, backward, Adam), as each library does it.

All keep float32 weights and the same fused Adam; half-precision inputs mean autocast for PyTorch's own products and
rounded copies of the weights for the others.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttc import ops

Inputs = dict[str, Tensor]
LEARNING_RATE = 1e-4


class Missing(Exception):
    """What a competitor needs is not here."""


def impl_for(x: Tensor) -> str:
    """Ours on a GPU and in a rehearsal of one: the kernels; else what "auto" takes."""
    return "triton" if not x.is_cuda and os.environ.get("TRITON_INTERPRET") == "1" else "auto"


@cache
def sparsify_functions() -> tuple[Callable, Callable]:
    """eai-sparsify's fused encoder and its decoder."""
    if not torch.cuda.is_available():
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from sparsify.fused_encoder import fused_encoder
            from sparsify.utils import decoder_impl
    except ImportError as error:
        raise Missing(f"eai-sparsify: {error}") from error
    return fused_encoder, decoder_impl


class Step:
    """Parameters, optimiser and a forward pass.

    Args:
        inputs: as drawn by the registry.
        forward: ``(x, parameters) -> y``.
    """

    def __init__(self, inputs: Inputs, forward: Callable[[Tensor, Inputs], Tensor]):
        self.x, self.target, self.forward = inputs["x"], inputs["target"], forward
        self.parameters = {
            name: inputs[name].detach().to(torch.float32, copy=True).requires_grad_()
            for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        }
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=LEARNING_RATE, fused=True)

    def loss(self) -> Tensor:
        error = self.forward(self.x, self.parameters).float() - self.target.float()
        return error.square().sum(-1).mean()

    def run(self) -> Tensor:
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Loss and gradients, without a step."""
        loss = self.loss()
        found = torch.autograd.grad(loss, tuple(self.parameters.values()))
        return {"loss": loss.detach(), **dict(zip(self.parameters, found, strict=True))}


def _ours(k: int, impl: str) -> Callable[[Tensor, Inputs], Tensor]:
    def forward(x: Tensor, p: Inputs) -> Tensor:
        acts = ops.encode(x, p["W_enc"].to(x.dtype), p["b_enc"], k=k, impl=impl)
        return ops.decode(acts, p["W_dec"].to(x.dtype), p["b_dec"], impl=impl)

    return forward


def fasttc(inputs: Inputs, k: int) -> Step:
    return Step(inputs, _ours(k, impl_for(inputs["x"])))


class _RowStep(Step):
    """Ours with the gradient matrices left out: Adam happens inside the sums over the tokens of each feature."""

    def __init__(self, inputs: Inputs, k: int):
        super().__init__(inputs, _ours(k, impl_for(inputs["x"])))
        self.k, self.impl = k, impl_for(self.x)
        half = self.x.dtype if self.x.dtype != torch.float32 else None
        p = self.parameters
        self.rows = ops.RowAdam(p["W_enc"], p["W_dec"], shadow=half)
        self.optimiser = torch.optim.Adam([p["b_enc"], p["b_dec"]], lr=LEARNING_RATE, fused=True)

    @torch.no_grad()
    def run(self) -> Tensor:
        rows, p = self.rows, self.parameters
        W_enc = rows.W_enc if rows.shadow_enc is None else rows.shadow_enc
        W_dec = rows.W_dec if rows.shadow_dec is None else rows.shadow_dec
        acts = ops.encode(self.x, W_enc, p["b_enc"], k=self.k, impl=self.impl)
        error, squares = ops.residual(acts, W_dec, self.target, p["b_dec"], impl=self.impl)
        weight = 2 / len(self.x)
        rounded = error.to(self.x.dtype)  # it is gathered: half the bytes in half precision
        report = rows.step(acts, rounded, self.x, lr=LEARNING_RATE, weight=weight, impl=self.impl)
        p["b_enc"].grad, p["b_dec"].grad = report.grad_b_enc, weight * error.sum(0)
        self.optimiser.step()
        return squares.mean()

    def gradients(self) -> dict[str, Tensor]:
        """Of a first step, as the optimiser saw them: a first moment is then ``1 - beta`` times the gradient."""
        loss, share = self.run(), 1 - self.rows.betas[0]
        found = {"W_enc": self.rows.state["enc.m"] / share, "W_dec": self.rows.state["dec.m"] / share}
        for name in ("b_enc", "b_dec"):
            found[name] = self.optimiser.state[self.parameters[name]]["exp_avg"] / share
        return {"loss": loss, **found}


def dense(inputs: Inputs, k: int) -> Step:
    def forward(x: Tensor, p: Inputs) -> Tensor:
        half = x.dtype != torch.float32
        with torch.autocast(x.device.type, dtype=x.dtype if half else None, enabled=half):
            z = F.linear(x, p["W_enc"], p["b_enc"]).relu()
            top = z.topk(k, dim=-1, sorted=False)
            acts = torch.zeros_like(z).scatter(1, top.indices, top.values)
            return acts @ p["W_dec"] + p["b_dec"]

    return Step(inputs, forward)


def compiled(inputs: Inputs, k: int) -> Step:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise Missing("torch.compile needs Triton's compiler, which TRITON_INTERPRET=1 switches off")
    step = dense(inputs, k)
    step.forward = torch.compile(step.forward, dynamic=False)
    return step


def plain(inputs: Inputs, k: int) -> Step:
    """``embedding_bag`` for the decoder, its own gradients, and autograd's dense ones for the encoder."""

    def forward(x: Tensor, p: Inputs) -> Tensor:
        z = F.linear(x, p["W_enc"].to(x.dtype), p["b_enc"].to(x.dtype)).relu()
        top = z.topk(k, dim=-1, sorted=False)
        W_dec = p["W_dec"].to(x.dtype)
        return F.embedding_bag(top.indices, W_dec, per_sample_weights=top.values, mode="sum") + p["b_dec"]

    return Step(inputs, forward)


def sparsify(inputs: Inputs, k: int) -> Step:
    fused_encoder, decoder = sparsify_functions()

    def forward(x: Tensor, p: Inputs) -> Tensor:
        half = x.dtype
        values, indices, _ = fused_encoder(x, p["W_enc"].to(half), p["b_enc"].to(half), k, "topk")
        return decoder(indices, values, p["W_dec"].to(half).mT) + p["b_dec"]

    return Step(inputs, forward)


STEP_MAKERS: dict[str, Callable[[Inputs, int], Step]] = {
    "fasttc": fasttc,
    "fasttc_rows": _RowStep,
    "dense": dense,
    "compiled": compiled,
    "embedding_bag": plain,
    "sparsify": sparsify,
}
