"""What is measured: every op with its inputs, its competitors, its float64 oracle and the work it cannot avoid."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import competitors as other

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """N tokens of width D, F features of which K are active per token, in one dtype."""

    n: int
    d: int
    f: int
    k: int
    dtype: str = "float32"

    @classmethod
    def parse(cls, text: str) -> "Problem":
        """From ``N,D,F,K`` or ``N,D,F,K,dtype``."""
        parts = text.split(",")
        if len(parts) not in (4, 5):
            raise ValueError(f"shape: expected N,D,F,K or N,D,F,K,dtype, got {text!r}")
        return cls(*map(int, parts[:4]), *parts[4:])

    def __str__(self) -> str:
        return f"{self.n},{self.d},{self.f},{self.k},{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes that no implementation avoids: every input read, every output written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class OpSpec:
    """One op.

    Attributes:
        name: of the op, as in ``fasttc.ops``.
        competitors: name -> ``make(inputs, k)``; "fasttc" is ours. A maker returns a :class:`competitors.Run`, or
            raises :class:`competitors.Missing` where what it needs is not installed.
        oracle: results in float64 from the same inputs, under the names that the runs use.
        work: what cannot be avoided.
    """

    name: str
    competitors: dict[str, Callable[[Inputs, int], other.Run]]
    oracle: Callable[[Inputs, int], dict[str, Tensor]]
    work: Callable[[Problem], Work]


def draw(problem: Problem, device: str, seed: int) -> Inputs:
    """Inputs of every op, drawn in their dtype: tokens x and target [N, D], weights with rows of length about one,
    and, for the ops after the encoder, uniformly random ``indices [N, K]`` with values [N, K] (float32)."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, n, d, f = problem.torch_dtype, problem.n, problem.d, problem.f

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)

    drawn = {
        "x": normal(n, d),
        "target": normal(n, d),
        "W_enc": normal(f, d, scale=d**-0.5),
        "b_enc": normal(f, scale=0.1),
        "W_dec": normal(f, d, scale=d**-0.5),
        "b_dec": normal(d, scale=0.1),
        "values": normal(n, problem.k).float().abs(),
    }
    stride = torch.randint(1, max(f // problem.k, 2), (n, 1), generator=generator, device=device)
    first = torch.randint(0, f, (n, 1), generator=generator, device=device)
    steps = torch.arange(problem.k, device=device)
    indices = (first + stride * steps) % f  # K distinct features: stride · K <= F
    return {**drawn, "indices": indices.sort(1).values.int()}


def _size(problem: Problem) -> int:
    return problem.torch_dtype.itemsize


def _encode_work(p: Problem) -> Work:
    return Work(2 * p.n * p.d * p.f, _size(p) * p.d * (p.n + p.f) + 8 * p.n * p.k)


def _decode_work(p: Problem) -> Work:
    """Counted without reuse: every entry reads its row."""
    return Work(2 * p.n * p.k * p.d, _size(p) * p.d * p.n * p.k + 4 * p.n * p.d + 8 * p.n * p.k)


def _decode_backward_work(p: Problem) -> Work:
    rows = _decode_work(p)
    return Work(2 * rows.flops, 2 * rows.bytes + 4 * p.f * p.d)


def _encode_backward_work(p: Problem) -> Work:
    rows = _decode_work(p)
    return Work(rows.flops, rows.bytes + 4 * p.f * p.d)


def _edges_work(p: Problem) -> Work:
    """Every gradient and every entry's decoder row read once, every edge written."""
    n, targets = p.n * p.k, other.EDGE_TARGETS
    return Work(2 * targets * n * p.d, _size(p) * p.d * (targets * p.n + n) + 4 * targets * n)


def _step_work(p: Problem) -> Work:
    """Encode, decode, both backwards, and Adam: weights and two moments of two matrices, read and written."""
    parts = [_encode_work(p), _decode_work(p), _decode_backward_work(p), _encode_backward_work(p)]
    adam = 2 * p.f * p.d * 7 * 4
    return Work(sum(w.flops for w in parts), sum(w.bytes for w in parts) + adam)


REGISTRY = {
    spec.name: spec
    for spec in (
        OpSpec("encode", other.ENCODE, other.encode_oracle, _encode_work),
        OpSpec("encode_batch", other.ENCODE_BATCH, other.batch_encode_oracle, _encode_work),
        OpSpec("encode_threshold", other.ENCODE_THRESHOLD, other.jump_oracle, _encode_work),
        OpSpec("decode", other.DECODE, other.decode_oracle, _decode_work),
        OpSpec("encode_backward", other.ENCODE_BACKWARD, other.encode_backward_oracle, _encode_backward_work),
        OpSpec("decode_backward", other.DECODE_BACKWARD, other.decode_backward_oracle, _decode_backward_work),
        OpSpec("edges", other.EDGES, other.edges_oracle, _edges_work),
        OpSpec("step", other.STEP, other.step_oracle, _step_work),
    )
}
