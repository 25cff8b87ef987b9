"""Which implementation of an op runs, and why: a cost model over constants kept as data (``_costs.py``)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from fasttc.ops._costs import COSTS, Costs, costs_of

Impl = Literal["auto", "reference", "torch", "triton"]
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason it was chosen.

    Attributes:
        impl: "reference", "torch" or "triton".
        reason: in words.
        algorithm: "sparse" or "dense": whether rows are gathered or a dense [N, F] is multiplied.
        gemm: "tile" (our GEMM) or "vendor" (cuBLAS, hipBLASLt), for an encoder.
        seconds: predicted time; None without a cost model (a CPU) or without sizes.
        roof: predicted time at the device's rates, no byte moved twice; None likewise.
    """

    impl: str
    reason: str
    algorithm: str = "sparse"
    gemm: str = "tile"
    seconds: float | None = None
    roof: float | None = None

    def __str__(self) -> str:
        text = f"{self.impl}: {self.reason}"
        if self.seconds is not None and self.roof is not None:
            text += (
                f"; predicted {1e3 * self.seconds:.3g} ms, roof {1e3 * self.roof:.3g} ms "
                f"({100 * self.roof / self.seconds:.0f} % of it)"
            )
        return text


@dataclass(frozen=True)
class Sizes:
    """What an op's cost depends on: tokens, widths, features, active features per token, bytes per element."""

    n: int
    d: int
    n_features: int
    k: float
    itemsize: int


@dataclass(frozen=True)
class Estimate:
    """One way to run an op, its predicted seconds, and the roof of the op."""

    algorithm: str
    gemm: str
    seconds: float
    roof: float


def choose(
    impl: str,
    op: str,
    x: Tensor,
    *,
    n_features: int | None = None,
    k: float | None = None,
    device: str | None = None,
) -> Choice:
    """Resolves ``impl`` for ``op`` on ``x``. A named implementation is returned as named or refused, never replaced.

    Args:
        impl: "auto", "reference", "torch" or "triton".
        op: "encode", "decode", "segment", "edges", "row_adam", "encode_backward" or "decode_backward".
        x: the tensor [..., D] whose device, dtype and shape decide.
        n_features: F, and k: active features per token; with both the cost model speaks.
        device: name of a device class of ``_costs.py`` to answer for, instead of the device of x.

    Raises:
        ValueError: ``impl``, ``op`` or ``device`` is not among the names, or ``impl="triton"`` with a tensor that the
            kernels cannot read.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl: expected one of {', '.join(get_args(Impl))}, got {impl!r}")
    if op not in _MODELS:
        raise ValueError(f"op: expected one of {', '.join(_MODELS)}, got {op!r}")
    if impl in ("reference", "torch"):
        return Choice(impl, "named by the caller")
    on_gpu = x.is_cuda or device is not None
    if impl == "auto" and not on_gpu:  # before anything that loads Triton
        return Choice("torch", f"the fastest implementation of {op} on {x.device.type}")
    refusal = None if device is not None else _refusal(x)
    if impl == "triton" and refusal is not None:
        raise ValueError(f"impl='triton': {refusal}; use impl='auto', 'torch' or 'reference'")
    if refusal is not None:
        return Choice("torch", f"the only implementation of {op} on {x.device.type} in {x.dtype}")
    if not on_gpu:
        return Choice("triton", "named by the caller, in Triton's interpreter")
    costs, configs = _device_costs(x, device)
    why = "named by the caller" if impl == "triton" else f"{op} on {costs.name}"
    if n_features is None or k is None:
        return Choice("triton", f"{why}{configs}")
    return _cheapest(op, costs, Sizes(x.numel() // max(x.shape[-1], 1), x.shape[-1], n_features, k, x.element_size()),
                     why, configs)  # fmt: skip


def explain(
    op: str,
    x: Tensor,
    *,
    impl: str = "auto",
    n_features: int | None = None,
    k: float | None = None,
    device: str | None = None,
) -> str:
    """Says, in one line, which implementation of ``op`` would run on ``x`` and why.

    With ``n_features`` and ``k``, and on a GPU (or for a ``device`` class such as ``"NVIDIA H200"``), also how (sparse
    or dense, our GEMM or the vendor's), the predicted time, and the roof: the time at the device's rates with no byte
    moved twice. See :func:`choose` for the arguments.
    """
    return str(choose(impl, op, x, n_features=n_features, k=k, device=device))


def interpreter_ready() -> bool:
    """Whether kernels would run in Triton's interpreter. Loads Triton only where TRITON_INTERPRET=1."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from fasttc.kernels._lang import interpreting

    return interpreting()


def _refusal(x: Tensor) -> str | None:
    """Why the kernels cannot read x, or None."""
    if x.dtype not in _KERNEL_DTYPES:
        return f"expected float16, bfloat16 or float32, got {x.dtype}"
    if x.is_cuda and find_spec("triton") is None:
        return "expected Triton to be installed, got none"
    if not x.is_cuda and not interpreter_ready():
        return (
            f"expected a tensor on a GPU, got one on {x.device.type} (to run the kernels in Triton's interpreter, set "
            "TRITON_INTERPRET=1 before Triton is first imported)"
        )
    return None


def _device_costs(x: Tensor, device: str | None) -> tuple[Costs, str]:
    """The device class, and a word on the config table where it is not the device's own."""
    if device is not None:
        for costs in COSTS:
            if costs.name == device:
                return costs, ""
        raise ValueError(f"device: expected one of {', '.join(c.name for c in COSTS)}, got {device!r}")
    from fasttc.kernels._launch import architecture, nearest_architecture

    own = architecture(x.device)
    known = nearest_architecture(own)
    costs = costs_of(torch.cuda.get_device_name(x.device), known)
    return costs, "" if own == known else f" ({own} has no configs of its own and uses those of {known})"


def _cheapest(op: str, costs: Costs, sizes: Sizes, why: str, configs: str) -> Choice:
    estimates = _MODELS[op](costs, sizes)
    best = min(estimates, key=lambda e: e.seconds)
    others = ", ".join(f"{_label(e)} {1e3 * e.seconds:.3g} ms" for e in estimates if e is not best)
    reason = f"{why}{configs}, {_label(best)}" + (f" (else {others})" if others else "")
    return Choice("triton", reason, best.algorithm, best.gemm, best.seconds, best.roof)


def _label(estimate: Estimate) -> str:
    if estimate.algorithm == "dense":
        return "dense product"
    return {"tile": "our GEMM", "vendor": "the vendor's GEMM", "": "gathered rows"}[estimate.gemm]


def _gemm_seconds(costs: Costs, sizes: Sizes) -> float:
    """One product of N·D·F multiply-adds by the vendor's library."""
    rate = costs.half if sizes.itemsize == 2 else costs.single
    return 2 * sizes.n * sizes.d * sizes.n_features / rate


def _encode(costs: Costs, s: Sizes) -> list[Estimate]:
    """Our GEMM writes the scratch while it multiplies; the vendor's is faster, but the scratch is read again."""
    product = _gemm_seconds(costs, s)
    scratch = 4 * s.n * s.n_features / costs.bandwidth
    groups = scratch / 8  # the maxima, written and read
    select = s.n * costs.select_row * s.k / 64 + groups + 64 * s.n * s.k / costs.gather + 4 * costs.launch
    # Our float32 tiles stay off the matrix units and lose more than half precision does (predicted).
    efficiency = costs.tile_efficiency if s.itemsize == 2 else costs.tile_efficiency / 2
    roof = max(product, s.itemsize * s.d * (s.n + s.n_features) / costs.bandwidth)
    return [
        Estimate("sparse", "tile", max(product / efficiency, scratch) + select, roof),
        Estimate("sparse", "vendor", max(product, scratch) + scratch + select, roof),
    ]


def _gathered(costs: Costs, s: Sizes) -> float:
    """N·k rows of width D gathered by index."""
    return s.n * s.k * (s.d * s.itemsize + 8) / costs.gather


def _dense_operand(costs: Costs, s: Sizes) -> float:
    """A dense [N, F] of activations written and read once."""
    return 2 * s.itemsize * s.n * s.n_features / costs.bandwidth


def _touched(costs: Costs, s: Sizes) -> float:
    """Every row that can be used, read once, and a float32 [N, D]."""
    rows = min(s.n * s.k, s.n_features)
    return (rows * s.d * s.itemsize + 4 * s.n * s.d + 8 * s.n * s.k) / costs.bandwidth


def _decode(costs: Costs, s: Sizes) -> list[Estimate]:
    sparse = _gathered(costs, s) + 4 * s.n * s.d / costs.bandwidth + costs.launch
    dense = _gemm_seconds(costs, s) + _dense_operand(costs, s) + 3 * costs.launch
    return _two(sparse, dense, _touched(costs, s), s)


def _sorted_sums(costs: Costs, s: Sizes) -> float:
    """Sort of the entries by feature (10 passes over 8 bytes), their rows gathered, a float32 [F, D] written."""
    sort = 10 * 8 * s.n * s.k / costs.bandwidth + 20 * costs.launch
    return sort + _gathered(costs, s) + 4 * s.n_features * s.d / costs.bandwidth


def _decode_backward(costs: Costs, s: Sizes) -> list[Estimate]:
    """Gradients of the values and of W_dec."""
    sparse = _gathered(costs, s) + _sorted_sums(costs, s)
    dense = 2 * _gemm_seconds(costs, s) + 2 * _dense_operand(costs, s) + 6 * costs.launch
    return _two(sparse, dense, _touched(costs, s) + 4 * s.n_features * s.d / costs.bandwidth, s)


def _encode_backward(costs: Costs, s: Sizes) -> list[Estimate]:
    """Gradients of W_enc and b_enc."""
    dense = _gemm_seconds(costs, s) + _dense_operand(costs, s) + 4 * costs.launch
    roof = (4 * s.n_features * s.d + s.itemsize * s.n * s.d) / costs.bandwidth
    return _two(_sorted_sums(costs, s), dense, roof, s)


def _edges(costs: Costs, s: Sizes) -> list[Estimate]:
    """N targets against k active features per position; D-wide rows of W_dec and of the gradients, read once."""
    seconds = max(_gathered(costs, s), _touched(costs, s)) + costs.launch
    return [Estimate("sparse", "", seconds, _touched(costs, s))]


def _segment(costs: Costs, s: Sizes) -> list[Estimate]:
    """A sum per feature of rows of width D."""
    roof = (4 * s.n_features * s.d + s.itemsize * s.n * s.d) / costs.bandwidth
    return [Estimate("sparse", "", _sorted_sums(costs, s), roof)]


def _row_adam(costs: Costs, s: Sizes) -> list[Estimate]:
    """Products at the entries, then both sums in one pass over float32 weights and moments: 24 bytes per parameter
    and 2 for the half-precision copy."""
    weights = 2 * s.n_features * s.d * (24 + (2 if s.itemsize == 2 else 0)) / costs.bandwidth
    sort = 10 * 8 * s.n * s.k / costs.bandwidth + 20 * costs.launch
    return [Estimate("sparse", "", 3 * _gathered(costs, s) + sort + weights, weights)]


def _two(sparse: float, dense: float, roof: float, s: Sizes) -> list[Estimate]:
    """Both ways; the dense one only in half precision, where a GEMM is fast enough to compete."""
    ways = [Estimate("sparse", "", sparse, roof)]
    return [*ways, Estimate("dense", "", dense, min(roof, dense))] if s.itemsize == 2 else ways


_MODELS: dict[str, Callable[[Costs, Sizes], list[Estimate]]] = {
    "encode": _encode,
    "decode": _decode,
    "segment": _segment,
    "edges": _edges,
    "row_adam": _row_adam,
    "encode_backward": _encode_backward,
    "decode_backward": _decode_backward,
}
