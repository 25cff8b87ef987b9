"""impl=: a named implementation runs or raises, and nothing else runs in its place."""

import contextlib

import pytest
import torch

from fasttc import ops
from fasttc.ops import _torch, reference
from fasttc.testing import draw_acts

CALLS = {
    "encode": lambda impl: ops.encode(torch.ones(3, 4), torch.ones(6, 4), torch.ones(6), k=2, impl=impl),
    "decode": lambda impl: ops.decode(draw_acts(3, 2, 6), torch.ones(6, 4), impl=impl),
    "edges": lambda impl: ops.edges(
        torch.ones(2, 4, 3),
        torch.ones(6, 3),
        torch.zeros(5).long(),
        torch.zeros(5).long(),
        torch.ones(5),
        impl=impl,
    ),
}


class BrokenError(Exception):
    """What the replaced implementations raise."""


@pytest.fixture
def broken(monkeypatch):
    """Makes both sides of an op raise; returns the list of sides that were asked."""

    def install(op: str) -> list[str]:
        asked: list[str] = []
        for name, module in (("torch", _torch), ("reference", reference)):

            def refuse(*_args, name=name, **_kwargs):
                asked.append(name)
                raise BrokenError(name)

            monkeypatch.setattr(module, op, refuse)
        return asked

    return install


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_named_implementation_is_the_only_one_asked(broken, op, impl):
    asked = broken(op)
    with pytest.raises(BrokenError, match=impl):
        CALLS[op](impl)
    assert asked == [impl]


@pytest.mark.parametrize("op", CALLS)
def test_triton_never_falls_back(broken, op):
    asked = broken(op)
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # refused; a BrokenError is not
        CALLS[op]("triton")
    assert asked == []


@pytest.mark.parametrize("op", CALLS)
def test_explain_names_the_choice_and_the_reason(op):
    assert ops.explain(op, torch.ones(2, 3)).startswith("torch: ")
    assert ops.explain(op, torch.ones(2, 3), impl="reference").startswith("reference: ")
    with pytest.raises(ValueError, match="impl: expected one of auto, reference, torch, triton, got 'x'"):
        ops.explain(op, torch.ones(2, 3), impl="x")
