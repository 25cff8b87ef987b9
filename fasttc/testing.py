"""What tests and benchmarks share: derived error budgets, hostile inputs, and NaN in every uninitialised tensor.

Nothing here is tuned by hand. A result is compared with an oracle computed in float64 from inputs that were drawn
in the tested dtype, and it may be at most twice as wrong as plain PyTorch in that dtype.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fasttc.ops import SparseActs

KINDS = ("normal", "heavy_tailed", "ties", "all_equal")
PATTERNS = ("uniform", "duplicates", "one_feature", "few_features")


# --- comparisons -----------------------------------------------------------------------------------------------


def assert_within_budget(
    got: Tensor,
    oracle64: Tensor,
    eager_same_dtype: Tensor,
    *,
    eps: float | None = None,
    magnitude: float | None = None,
    name: str = "result",
) -> None:
    """Fails unless ``err(got) <= 2 (err(eager) + eps · max|oracle|)``, for the largest and for the mean error.

    Args:
        got: the result under test, any float dtype.
        oracle64: the same computed in float64 from the same (already rounded) inputs, same shape.
        eager_same_dtype: the same computed by plain PyTorch, in the dtype of ``got``, same shape.
        eps: relative spacing of the rounding band; default: that of the dtype of ``got``.
        magnitude: size of the terms that were added up, where they cancel and ``max|oracle|`` says too little.
        name: what the message calls the result.

    Raises:
        AssertionError: always when it does not hold, also under ``python -O``; names the worst element. Shapes and
            dtypes are part of the check. A NaN where the oracle has none is an infinite error; infinities must be
            where the oracle has them.
    """
    if oracle64.dtype != torch.float64:
        raise AssertionError(f"{name}: expected an oracle in float64, got {oracle64.dtype}")
    for other, tensor in (("oracle", oracle64), ("eager result", eager_same_dtype)):
        if got.shape != tensor.shape:
            raise AssertionError(f"{name}: got shape {list(got.shape)}, the {other} has {list(tensor.shape)}")
    if got.dtype != eager_same_dtype.dtype:
        raise AssertionError(f"{name}: got {got.dtype}, the eager result is {eager_same_dtype.dtype}")
    if got.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps if eps is None else eps
    oracle = oracle64.detach().cpu()
    finite = oracle[oracle.isfinite()].abs()
    top = max(float(finite.max()) if finite.numel() else 0.0, magnitude or 0.0)
    error, eager_error = _error(got, oracle), _error(eager_same_dtype, oracle)
    for which, reduce in (("largest", torch.max), ("mean", torch.mean)):
        reached, eager = float(reduce(error)), float(reduce(eager_error))
        budget = 2 * (eager + eps * top)
        if not reached <= budget:
            raise AssertionError(
                f"{name}: {which} error {reached:.4g} exceeds the budget {budget:.4g} "
                f"= 2 * (eager {eager:.4g} + eps {eps:.3g} * {top:.4g}); {_worst(error, got, oracle)}"
            )


def assert_same_bits(got: Tensor, expected: Tensor, *, name: str = "result") -> None:
    """Fails unless both tensors have the same shape, dtype and bits (so +0 and -0 differ, and a NaN equals itself)."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(
            f"{name}: got {got.dtype} {list(got.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    raw = [tensor.detach().cpu().contiguous().reshape(-1, 1).view(torch.uint8) for tensor in (got, expected)]
    differs = (raw[0] != raw[1]).any(-1)
    if bool(differs.any()):
        first = int(differs.nonzero()[0])
        where = _coordinates(first, got.shape)
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {differs.numel()} elements differ, first at {where}: "
            f"got {got.detach().reshape(-1)[first].item()!r}, "
            f"expected {expected.detach().reshape(-1)[first].item()!r}"
        )


def _error(tensor: Tensor, oracle: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().double()
    error = (tensor - oracle).abs()
    same = (tensor == oracle) | (tensor.isnan() & oracle.isnan())
    return torch.where(same, 0.0, error.nan_to_num(nan=torch.inf, posinf=torch.inf))


def _worst(error: Tensor, got: Tensor, oracle: Tensor) -> str:
    flat = int(error.argmax())
    return (
        f"worst at {_coordinates(flat, error.shape)}: got {got.detach().reshape(-1)[flat].item()!r}, "
        f"oracle {oracle.reshape(-1)[flat].item()!r}"
    )


def _coordinates(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    found = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        found.append(place)
    return tuple(reversed(found))


# --- inputs ----------------------------------------------------------------------------------------------------


def draw(
    kind: str,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
    device: str | torch.device | None = None,
) -> Tensor:
    """A seeded tensor of one of the ``KINDS``, drawn on the CPU and rounded to ``dtype``: its float64 copy is exact.

    Like everything drawn here it goes to ``device``, torch's default device where none is given.

    * ``normal``: standard normal.
    * ``heavy_tailed``: Student's t with 2 degrees of freedom, cut at ±1000: single entries dominate their row.
    * ``ties``: small integers, so that sums of products are exact in every dtype and equal values are common.
    * ``all_equal``: every entry is one.
    """
    generator = torch.Generator().manual_seed(seed)
    on_cpu = {"generator": generator, "device": "cpu"}
    if kind == "normal":
        drawn = torch.randn(*shape, dtype=torch.float64, **on_cpu)
    elif kind == "heavy_tailed":
        normal = torch.randn(3, *shape, dtype=torch.float64, **on_cpu)
        drawn = (normal[0] / normal[1:].square().mean(0).sqrt()).clamp(-1000, 1000)
    elif kind == "ties":
        drawn = torch.randint(-1, 2, shape, **on_cpu).double()
    elif kind == "all_equal":
        drawn = torch.ones(*shape, dtype=torch.float64, device="cpu")
    else:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return (drawn * scale).to(dtype).to(device or torch.get_default_device())


def draw_coder(
    n_features: int,
    d_in: int,
    d_out: int | None = None,
    *,
    kind: str = "normal",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> dict[str, Tensor]:
    """W_enc [F, D], b_enc [F], W_dec [F, D_out], b_dec [D_out]; rows of length about one unless ``kind`` is "ties"."""
    d_out = d_in if d_out is None else d_out
    exact = kind in ("ties", "all_equal")
    sizes = {
        "W_enc": (n_features, d_in),
        "b_enc": (n_features,),
        "W_dec": (n_features, d_out),
        "b_dec": (d_out,),
    }
    return {
        name: draw(
            kind,
            *shape,
            dtype=dtype,
            seed=seed + 1000 * i,
            scale=1.0 if exact else shape[-1] ** -0.5,
            device=device,
        )
        for i, (name, shape) in enumerate(sizes.items(), start=1)
    }


def draw_acts(
    n_tokens: int,
    k: int,
    n_features: int,
    *,
    pattern: str = "uniform",
    csr: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> SparseActs:
    """Seeded activations of ``n_tokens`` tokens, padded [N, K] or, with ``csr``, rows of 0 to k entries.

    Patterns of the indices: ``uniform`` (distinct within a row), ``duplicates`` (a row may name a feature twice),
    ``one_feature`` (every token has feature ``F // 2`` among its own; needs k <= F), ``few_features`` (only the
    first k features ever occur: all others are empty).
    """
    device = device or torch.get_default_device()
    on_cpu = {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}
    if pattern == "duplicates":
        indices = torch.randint(0, n_features, (n_tokens, k), **on_cpu)
    elif pattern in ("uniform", "one_feature", "few_features"):
        reach = k if pattern == "few_features" else n_features
        rank = torch.rand(n_tokens, reach, **on_cpu)
        if pattern == "one_feature":
            rank[:, n_features // 2] = 2.0
        indices = rank.topk(k, dim=-1).indices
    else:
        raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}, got {pattern!r}")
    indices = indices.sort(-1).values.int().to(device)
    values = draw("normal", n_tokens, k, dtype=dtype, seed=seed + 1, device=device)
    if not csr:
        return SparseActs(values, indices, n_features, (n_tokens,))
    lengths = torch.randint(0, k + 1, (n_tokens,), **on_cpu).to(device)
    kept = torch.arange(k, device=device) < lengths[:, None]
    row_ptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return SparseActs(values[kept], indices[kept], n_features, (n_tokens,), row_ptr)


# --- memory ----------------------------------------------------------------------------------------------------

_MAKERS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@contextmanager
def poison_empty() -> Iterator[None]:
    """Inside, ``torch.empty`` and its kin return NaN (integers: a large number; bool: True).

    An output that a kernel forgot to write then cannot pass for zero. Holds for every thread, so also for backward
    passes, and for code that reads the functions from ``torch`` at call time.
    """
    inherited = [(owner, name, name in vars(owner), getattr(owner, name)) for owner, name in _MAKERS]
    for owner, name, _, make in inherited:
        setattr(owner, name, _poisoned(make))
    try:
        yield
    finally:
        for owner, name, own, make in inherited:
            if own:
                setattr(owner, name, make)
            else:
                delattr(owner, name)


def _poisoned(make: Any) -> Any:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.layout is not torch.strided:
            return tensor
        with torch.no_grad():
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(torch.iinfo(tensor.dtype).max - 17)

    return poisoned
