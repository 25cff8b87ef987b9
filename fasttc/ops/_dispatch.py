"""Which implementation of an op runs, and why."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Impl = Literal["auto", "reference", "torch", "triton"]


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason it was chosen."""

    impl: str
    reason: str

    def __str__(self) -> str:
        return f"{self.impl}: {self.reason}"


def choose(impl: str, op: str, x: Tensor) -> Choice:
    """Resolves ``impl`` for ``op`` on ``x``. A named implementation is returned as named or refused, never replaced.

    Raises:
        ValueError: ``impl`` is not one of the four names.
        NotImplementedError: the named implementation of this op does not exist.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl: expected one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl == "triton":
        raise NotImplementedError(
            f"the Triton implementation of {op} is not built yet; use 'auto', 'torch' or 'reference'"
        )
    if impl != "auto":
        return Choice(impl, "named by the caller")
    return Choice("torch", f"the only optimised implementation of {op} on {x.device.type}")


def explain(op: str, x: Tensor, *, impl: str = "auto") -> str:
    """Says, in one line, which implementation of ``op`` would run on ``x`` and why."""
    return str(choose(impl, op, x))
