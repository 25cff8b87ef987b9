"""Whom each op is measured against: ours, dense PyTorch (eager and compiled), eai-sparsify, and plain gathers."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttc import ops

from .steps import STEP_MAKERS, Missing, Step, impl_for, sparsify_functions

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """One competitor, ready: ``call`` is timed, ``outputs`` is what the gate compares with the oracle."""

    call: Callable[[], object]
    outputs: Callable[[], dict[str, Tensor]]


def _same(call: Callable[[], dict[str, Tensor]]) -> Run:
    return Run(call, call)


def _compiled(function: Callable) -> Callable:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise Missing("torch.compile needs Triton's compiler, which TRITON_INTERPRET=1 switches off")
    return torch.compile(function, dynamic=False)


# --- encode ----------------------------------------------------------------------------------------------------


def _found(values: Tensor, indices: Tensor, i: Inputs) -> dict[str, Tensor]:
    """What the gate looks at: the values in order, and the exact pre-activations at the indices, in order."""
    exact = _pre(i).gather(1, indices.long()).relu()
    return {"values": values.float().sort(1).values, "selected": exact.sort(1).values}


def _pre(i: Inputs) -> Tensor:
    return i["x"].double() @ i["W_enc"].double().T + i["b_enc"].double()


def _dense_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top = F.linear(x, W_enc, b_enc).relu().topk(k, dim=-1, sorted=False)
    return top.values, top.indices


def _encoder(make: Callable[[], Callable]) -> Callable[[Inputs, int], Run]:
    def build(i: Inputs, k: int) -> Run:
        function = make()

        def call():
            return function(i["x"], i["W_enc"], i["b_enc"], k)

        return Run(call, lambda: _found(*call()[:2], i))

    return build


def _our_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acts = ops.encode(x, W_enc, b_enc, k=k, impl=impl_for(x))
    return acts.values, acts.indices


def _sparsify_encode() -> Callable:
    fused, _ = sparsify_functions()
    return lambda x, W, b, k: fused(x, W, b, k, "topk")


def _gemm(i: Inputs, k: int) -> Run:
    """The product alone: the floor of an encoder. It selects nothing, so the gate has nothing to compare."""
    return Run(lambda: F.linear(i["x"], i["W_enc"], i["b_enc"]), dict)


def encode_oracle(i: Inputs, k: int) -> dict[str, Tensor]:
    best = _pre(i).relu().topk(k, dim=1).values.sort(1).values
    return {"values": best, "selected": best}


def _kernel_encode(gemm: str) -> Callable[[], Callable]:
    """One of our three ways, whichever the dispatcher would choose: what its cost model is to be measured by."""

    def make() -> Callable:
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise Missing("kernels need a GPU or TRITON_INTERPRET=1")
        from fasttc.kernels.certificate import launch_encode_topk_certified
        from fasttc.kernels.encode import launch_encode_topk

        if gemm == "certified":
            return launch_encode_topk_certified
        return partial(launch_encode_topk, gemm=gemm)

    return make


ENCODE = {
    "fasttc": _encoder(lambda: _our_encode),
    **{f"fasttc_{way}": _encoder(_kernel_encode(way)) for way in ("tile", "vendor", "certified")},
    "dense": _encoder(lambda: _dense_encode),
    "compiled": _encoder(lambda: _compiled(_dense_encode)),
    "sparsify": _encoder(_sparsify_encode),
    "gemm": _gemm,
}


def _our_batch_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    return ops.encode(x, W_enc, b_enc, k=k, scope="batch", impl=impl_for(x)).values


def _dense_batch_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    return F.linear(x, W_enc, b_enc).relu().flatten().topk(len(x) * k, sorted=False).values


def _batch_encoder(function: Callable) -> Callable[[Inputs, int], Run]:
    def build(i: Inputs, k: int) -> Run:
        def call() -> dict[str, Tensor]:
            return {"values": function(i["x"], i["W_enc"], i["b_enc"], k)}

        return Run(call, lambda: {"values": call()["values"].float().sort().values})

    return build


def batch_encode_oracle(i: Inputs, k: int) -> dict[str, Tensor]:
    return {"values": _pre(i).relu().flatten().topk(len(i["x"]) * k).values.sort().values}


ENCODE_BATCH = {"fasttc": _batch_encoder(_our_batch_encode), "dense": _batch_encoder(_dense_batch_encode)}


def _threshold(i: Inputs, k: int) -> float:
    """What about k of the F pre-activations of a token exceed: they are normal, with variance 1 + 0.1^2."""
    share = torch.tensor(1 - k / len(i["W_enc"]), dtype=torch.float64)
    return float(1.01**0.5 * torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)))


def _our_jump(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: float) -> Tensor:
    return ops.encode(x, W_enc, b_enc, threshold=theta, impl=impl_for(x)).values


def _dense_jump(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: float) -> Tensor:
    z = F.linear(x, W_enc, b_enc)
    return torch.where(z > theta, z, 0.0)


def _jump(function: Callable) -> Callable[[Inputs, int], Run]:
    """The gate looks at ``sum of (value - θ)``: what rounding moves over the threshold changes nothing there."""

    def build(i: Inputs, k: int) -> Run:
        theta = _threshold(i, k)

        def call() -> Tensor:
            return function(i["x"], i["W_enc"], i["b_enc"], theta)

        def outputs() -> dict[str, Tensor]:
            values = call().double()
            return {"excess": (values - theta)[values != 0].sum().float()}

        return Run(call, outputs)

    return build


def jump_oracle(i: Inputs, k: int) -> dict[str, Tensor]:
    return {"excess": (_pre(i) - _threshold(i, k)).relu().sum()}


ENCODE_THRESHOLD = {"fasttc": _jump(_our_jump), "dense": _jump(_dense_jump)}


# --- decode ----------------------------------------------------------------------------------------------------


def _our_decode(values: Tensor, indices: Tensor, W: Tensor, b: Tensor) -> Tensor:
    acts = ops.SparseActs(values, indices, W.shape[0], (len(values),))
    return ops.decode(acts, W, b, impl=impl_for(W))


def _dense_decode(values: Tensor, indices: Tensor, W: Tensor, b: Tensor) -> Tensor:
    dense = W.new_zeros(len(values), W.shape[0]).scatter(1, indices.long(), values.to(W.dtype))
    return dense @ W + b


def _bag_decode(values: Tensor, indices: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return F.embedding_bag(indices, W, per_sample_weights=values.to(W.dtype), mode="sum") + b


def _sparsify_decode() -> Callable:
    _, decoder = sparsify_functions()
    return lambda values, indices, W, b: decoder(indices.long(), values.to(W.dtype), W.mT) + b


_DECODERS: dict[str, Callable[[], Callable]] = {
    "fasttc": lambda: _our_decode,
    "dense": lambda: _dense_decode,
    "compiled": lambda: _compiled(_dense_decode),
    "embedding_bag": lambda: _bag_decode,
    "sparsify": _sparsify_decode,
}


def _decoder(make: Callable[[], Callable]) -> Callable[[Inputs, int], Run]:
    def build(i: Inputs, k: int) -> Run:
        function = make()
        return _same(lambda: {"y": function(i["values"], i["indices"], i["W_dec"], i["b_dec"])})

    return build


def decode_oracle(i: Inputs, k: int) -> dict[str, Tensor]:
    rows = i["W_dec"].double()[i["indices"].long()]
    return {"y": (rows * i["values"].double()[..., None]).sum(1) + i["b_dec"].double()}


DECODE = {name: _decoder(make) for name, make in _DECODERS.items()}


# --- gradients -------------------------------------------------------------------------------------------------


def _gradients(output: Tensor, upstream: Tensor, leaves: dict[str, Tensor]) -> Run:
    """Times the backward alone, over a graph that is kept."""

    def call() -> dict[str, Tensor]:
        found = torch.autograd.grad(output, tuple(leaves.values()), upstream, retain_graph=True)
        return dict(zip(leaves, found, strict=True))

    return _same(call)


def _decode_backward(make: Callable[[], Callable]) -> Callable[[Inputs, int], Run]:
    def build(i: Inputs, k: int) -> Run:
        function = make()
        leaves = {name: i[name].detach().clone().requires_grad_() for name in ("values", "W_dec")}
        y = function(leaves["values"], i["indices"], leaves["W_dec"], i["b_dec"])
        return _gradients(y, i["target"].to(y.dtype), leaves)

    return build


def decode_backward_oracle(i: Inputs, k: int) -> dict[str, Tensor]:
    W, indices, dy = i["W_dec"].double(), i["indices"].long(), i["target"].double()
    dense = W.new_zeros(len(dy), len(W)).scatter_(1, indices, i["values"].double())
    return {"values": (W[indices] * dy[:, None]).sum(-1), "W_dec": dense.T @ dy}


DECODE_BACKWARD = {name: _decode_backward(make) for name, make in _DECODERS.items()}


def _encode_backward(make: Callable[[], Callable]) -> Callable[[Inputs, int], Run]:
    def build(i: Inputs, k: int) -> Run:
        function = make()
        leaves = {name: i[name].detach().clone().requires_grad_() for name in ("W_enc", "b_enc")}
        values = function(i["x"], leaves["W_enc"], leaves["b_enc"], k)[0]
        return _gradients(values.sum(), torch.ones_like(values.sum()), leaves)

    return build


def encode_backward_oracle(i: Inputs, k: int) -> dict[str, Tensor]:
    z = _pre(i)
    on = torch.zeros_like(z).scatter_(1, z.topk(k, dim=1).indices, 1.0) * (z > 0)
    return {"W_enc": on.T @ i["x"].double(), "b_enc": on.sum(0)}


ENCODE_BACKWARD = {
    "fasttc": _encode_backward(lambda: _our_encode),
    "dense": _encode_backward(lambda: _dense_encode),
    "compiled": _encode_backward(lambda: _compiled(_dense_encode)),
    "sparsify": _encode_backward(_sparsify_encode),
}


# --- edges -----------------------------------------------------------------------------------------------------


def _edge_inputs(i: Inputs) -> tuple[Tensor, ...]:
    """One prompt: x [T, D] gives G [B, T, D] of B targets; all entries of the activations are edges, token by token."""
    scale = torch.linspace(0.5, 1.5, EDGE_TARGETS, device=i["x"].device).to(i["x"].dtype)
    positions = torch.arange(len(i["x"]), device=i["x"].device).repeat_interleave(i["indices"].shape[1])
    return (
        scale[:, None, None] * i["x"],
        i["W_dec"],
        i["indices"].reshape(-1),
        positions,
        i["values"].reshape(-1),
    )


def _edges(function: Callable[..., Tensor]) -> Callable[[Inputs, int], Run]:
    def build(i: Inputs, k: int) -> Run:
        arguments = _edge_inputs(i)
        return _same(lambda: {"edges": function(*arguments)})

    return build


def _our_edges(G: Tensor, *others: Tensor) -> Tensor:
    return ops.edges(G, *others, impl=impl_for(G))


def _gathered_edges(G: Tensor, W: Tensor, features: Tensor, positions: Tensor, activations: Tensor) -> Tensor:
    """Rows of W copied and scaled, gradients gathered per edge: [B, n, D] exists."""
    rows = W[features.long()] * activations[:, None].to(W.dtype)
    return torch.einsum("bnd,nd->bn", G[:, positions], rows).float()


def edges_oracle(i: Inputs, k: int) -> dict[str, Tensor]:
    G, W, features, positions, activations = _edge_inputs(i)
    rows = W.double()[features.long()] * activations.double()[:, None]
    return {"edges": torch.einsum("bnd,nd->bn", G.double()[:, positions], rows)}


EDGE_TARGETS = 64  # rows of a graph swept at once
EDGES = {"fasttc": _edges(_our_edges), "dense": _edges(_gathered_edges)}


# --- the whole step --------------------------------------------------------------------------------------------


def _step(make: Callable[[Inputs, int], Step]) -> Callable[[Inputs, int], Run]:
    def build(i: Inputs, k: int) -> Run:
        step = make(i, k)
        return Run(step.run, step.gradients)

    return build


def step_oracle(i: Inputs, k: int) -> dict[str, Tensor]:
    """Loss and gradients of ``mean over tokens of |decode - target|^2`` by the reference implementation."""
    leaves = {name: i[name].double().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    acts = ops.encode(i["x"].double(), leaves["W_enc"], leaves["b_enc"], k=k, impl="reference")
    y = ops.decode(acts, leaves["W_dec"], leaves["b_dec"], impl="reference")
    loss = (y - i["target"].double()).square().sum(-1).mean()
    gradients = torch.autograd.grad(loss, tuple(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


STEP = {name: _step(make) for name, make in STEP_MAKERS.items()}
