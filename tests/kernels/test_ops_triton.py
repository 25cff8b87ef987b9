"""decode, residual, segment and edges with impl="triton": values, every gradient, repeated and second-order backward
passes, torch.library's own checks, and tracing without a break."""

import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fasttc import ops
from fasttc.ops import _triton
from fasttc.testing import assert_same_bits, assert_within_budget, draw, draw_acts, poison_empty

LAYOUTS = pytest.mark.parametrize("csr", [False, True], ids=["padded", "csr"])
SHAPES = [  # N, K, F, D
    pytest.param((1, 1, 1, 1), id="one-of-each"),
    pytest.param((7, 3, 13, 17), id="primes"),
    pytest.param((3, 5, 5, 8), id="K=F"),
    pytest.param((0, 2, 5, 8), id="empty-batch"),
]


@pytest.fixture(autouse=True)
def _poisoned_memory(request):
    with (
        nullcontext() if "tracing" in request.node.name else poison_empty()
    ):  # Dynamo cannot trace the poison
        yield


def leaves(
    shape, csr=False, dtype=torch.float32, pattern="uniform"
) -> tuple[ops.SparseActs, dict[str, Tensor]]:
    n, k, f, d = shape
    acts = draw_acts(n, k, f, csr=csr, pattern=pattern)
    tensors = {
        "values": acts.values,
        "W_dec": draw("normal", f, d, dtype=dtype, seed=3),
        "b_dec": draw("normal", d, dtype=dtype, seed=4),
        "init": draw("normal", n, d, dtype=dtype, seed=5),
        "target": draw("normal", n, d, dtype=dtype, seed=6),
    }
    return acts, tensors


def evaluate(op: str, acts: ops.SparseActs, tensors: dict[str, Tensor], impl: str) -> tuple[Tensor, ...]:
    acts = replace(acts, values=tensors["values"])
    if op == "decode":
        return (ops.decode(acts, tensors["W_dec"], tensors["b_dec"], init=tensors["init"], impl=impl),)
    if op == "residual":
        rest = {"init": tensors["init"], "impl": impl}
        return ops.residual(acts, tensors["W_dec"], tensors["target"], tensors["b_dec"], **rest)
    return (ops.segment(acts, tensors["init"], impl=impl),)


USED = {
    "decode": ["values", "W_dec", "b_dec", "init"],
    "residual": ["values", "W_dec", "b_dec", "init", "target"],
    "segment": ["values", "init"],
}


def forward_and_backward(op, acts, tensors, impl, dtype=None) -> list[Tensor]:
    """Outputs, then the gradients of a weighted sum of them with respect to every input."""
    own = {
        name: (t if dtype is None else t.to(dtype)).clone().requires_grad_() for name, t in tensors.items()
    }
    outputs = evaluate(op, acts, own, impl)
    weighted = sum(
        (out * draw("normal", *out.shape, seed=20 + i).to(out.dtype)).sum() for i, out in enumerate(outputs)
    )
    grads = torch.autograd.grad(weighted, [own[name] for name in USED[op]])
    return [*outputs, *grads]


def check(op: str, acts: ops.SparseActs, tensors: dict[str, Tensor]) -> None:
    got = forward_and_backward(op, acts, tensors, "triton")
    exact = forward_and_backward(op, acts, tensors, "reference", torch.float64)
    eager = forward_and_backward(op, acts, tensors, "reference")
    names = [f"output {i}" for i in range(len(got) - len(USED[op]))] + [
        f"gradient of {name}" for name in USED[op]
    ]
    for name, result, oracle, plain in zip(names, got, exact, eager, strict=True):
        eps = (
            8 * torch.finfo(result.dtype).eps
        )  # sums of up to D products whose terms are larger than the result
        assert_within_budget(result, oracle, plain.to(result.dtype), eps=eps, name=name)


@LAYOUTS
@pytest.mark.parametrize("op", USED)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_every_gradient(shape, op, csr):
    check(op, *leaves(shape, csr))


@LAYOUTS
@pytest.mark.parametrize("op", USED)
@pytest.mark.parametrize("pattern", ["duplicates", "one_feature", "few_features"])
def test_patterns_of_indices(pattern, op, csr):
    check(op, *leaves((7, 4, 15, 9), csr, pattern=pattern))


@LAYOUTS
@pytest.mark.parametrize("op", USED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_come_in_the_inputs_dtype(dtype, op, csr):
    acts, tensors = leaves((5, 3, 11, 12), csr, dtype)
    outputs = forward_and_backward(op, acts, tensors, "triton")
    split = len(outputs) - len(USED[op])
    assert {out.dtype for out in outputs[:split]} == {torch.float32}
    assert [g.dtype for g in outputs[split:]] == [tensors[name].dtype for name in USED[op]]
    check(op, acts, tensors)


@pytest.mark.parametrize("op", USED)
def test_two_backward_passes_over_one_graph_agree_and_change_nothing(op):
    acts, tensors = leaves((7, 3, 13, 17))
    own = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    outputs = evaluate(op, acts, own, "triton")
    before = [out.detach().clone() for out in outputs]
    total = sum(out.square().sum() for out in outputs)
    inputs = [own[name] for name in USED[op]]
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    second = torch.autograd.grad(total, inputs)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
    for out, kept in zip(outputs, before, strict=True):
        assert_same_bits(out.detach(), kept)
    for name, t in own.items():
        assert_same_bits(t.detach(), tensors[name], name=name)


@LAYOUTS
@pytest.mark.parametrize("op", USED)
def test_second_derivatives(op, csr):
    acts, tensors = leaves((4, 3, 7, 5), csr)

    def hessian_product(impl: str, dtype: torch.dtype) -> list[Tensor]:
        own = {name: t.to(dtype, copy=True).requires_grad_() for name, t in tensors.items()}
        inputs = [own[name] for name in USED[op]]
        total = sum(out.pow(3).sum() for out in evaluate(op, acts, own, impl))
        grads = torch.autograd.grad(total, inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))

    exact, eager = (hessian_product("reference", dtype) for dtype in (torch.float64, torch.float32))
    for name, got, oracle, plain in zip(
        USED[op], hessian_product("triton", torch.float32), exact, eager, strict=True
    ):
        assert_within_budget(got, oracle, plain, eps=32 * torch.finfo(torch.float32).eps, name=name)


def test_gradients_that_nobody_asks_for_are_not_computed(monkeypatch):
    import fasttc.kernels.sddmm
    import fasttc.kernels.segment

    def never(*_, **__):
        raise AssertionError("computed a gradient that was not asked for")

    acts, tensors = leaves((5, 3, 11, 8))
    values, W_dec = tensors["values"].clone().requires_grad_(), tensors["W_dec"].clone().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(fasttc.kernels.segment, "launch_segment", never)
        ops.decode(replace(acts, values=values), tensors["W_dec"], impl="triton").sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr(fasttc.kernels.sddmm, "launch_sddmm", never)
        ops.decode(acts, W_dec, impl="triton").sum().backward()
    assert values.grad is not None
    assert W_dec.grad is not None


def test_gradients_of_expanded_and_transposed_outputs():
    acts, tensors = leaves((5, 3, 11, 8))
    for transform in (lambda y: y.sum(), lambda y: (y.T @ y).sum(), lambda y: y[::2, 1::3].sum()):
        results = []
        for impl in ("triton", "reference"):
            W_dec = tensors["W_dec"].clone().requires_grad_()
            transform(ops.decode(acts, W_dec, impl=impl)).backward()
            results.append(W_dec.grad)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@LAYOUTS
@pytest.mark.parametrize(
    "name", ["decode_rows", "decode_residual", "sddmm", "segment_rows", "segment_encoder", "edges"]
)
def test_torch_library_accepts_the_op(name, csr):
    acts, t = leaves((4, 3, 7, 5), csr)
    t = {key: value.requires_grad_() for key, value in t.items()}
    entries = (t["values"], acts.indices, acts.row_ptr)
    plain = (t["values"].detach(), acts.indices, acts.row_ptr, t["init"].detach(), 7)
    positions = torch.tensor([0, 1, 1])
    arguments = {
        "decode_rows": (*entries, t["W_dec"], t["b_dec"], t["init"]),
        "decode_residual": (*entries, t["W_dec"], t["b_dec"], None, t["target"]),
        "sddmm": (t["init"], t["W_dec"], acts.indices, acts.row_ptr),
        "segment_rows": (*entries, t["init"], 7, torch.bfloat16),
        "segment_encoder": (*plain, t["values"].detach() * 2, torch.float32),
        "edges": (
            draw("normal", 2, 3, 5),
            t["W_dec"].detach(),
            positions * 2,
            positions,
            draw("normal", 3),
            None,
        ),
    }
    opcheck(getattr(_triton, name), arguments[name])


def test_tracing_without_a_break_gives_the_same_bits():
    acts, tensors = leaves((7, 3, 13, 17))

    def loss(values, W_dec, b_dec, init, target):
        own = replace(acts, values=values)
        error, squares = ops.residual(own, W_dec, target, b_dec, init=init, impl="triton")
        return (
            squares.sum()
            + ops.decode(own, W_dec, impl="triton").sum()
            + ops.segment(own, error, impl="triton").sum()
        )

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        own = [
            tensors[name].clone().requires_grad_() for name in ("values", "W_dec", "b_dec", "init", "target")
        ]
        value = function(*own)
        value.backward()
        results.append([value.detach(), *(t.grad for t in own)])
    for eager, traced in zip(*results, strict=True):
        assert_same_bits(traced, eager)


@pytest.mark.parametrize("csr", [False, True], ids=["padded", "csr"])
def test_the_dense_way_where_the_dispatcher_chooses_it(monkeypatch, csr):
    acts, tensors = leaves((7, 3, 13, 17), csr, torch.bfloat16)
    module = sys.modules["fasttc.ops.decode"]
    monkeypatch.setattr(
        module, "choose", lambda *_, **__: ops.Choice("triton", "for the test", algorithm="dense")
    )
    dense = forward_and_backward("decode", acts, tensors, "triton")
    monkeypatch.undo()
    sparse = forward_and_backward("decode", acts, tensors, "triton")
    for got, expected in zip(dense, sparse, strict=True):
        assert got.dtype == expected.dtype
        size = expected.float().abs().max()
        assert (got.float() - expected.float()).abs().max() <= 2**-6 * size  # activations rounded to bfloat16


@pytest.mark.parametrize("targets", [False, True], ids=["all", "causal"])
def test_edges(targets):
    G, W_dec = draw("normal", 4, 5, 9), draw("normal", 11, 9, seed=3)
    features, positions = torch.tensor([3, 0, 10, 3, 7]), torch.tensor([0, 1, 1, 3, 4])
    activations = draw("normal", 5, seed=4)
    target_positions = torch.tensor([0, 1, 3, 4]) if targets else None
    if targets:
        G[torch.arange(5)[None] > target_positions[:, None]] = 0
    arguments = (G, W_dec, features, positions, activations)
    got = ops.edges(*arguments, target_positions=target_positions, impl="triton")
    doubles = (G.double(), W_dec.double(), features, positions, activations.double())
    oracle, eager = ops.edges(*doubles, impl="reference"), ops.edges(*arguments, impl="reference")
    assert_within_budget(got, oracle, eager, eps=8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("wrong", ["values", "W_dec", "b_dec", "init"])
def test_float64_is_refused_by_name_and_taken_by_auto(wrong):
    acts, tensors = leaves((4, 3, 7, 5))
    tensors[wrong] = tensors[wrong].double()
    with pytest.raises(
        ValueError, match=r"impl='triton': expected float16, bfloat16 or float32, got torch\.float64"
    ):
        evaluate("decode", acts, tensors, "triton")
    (got,) = evaluate("decode", acts, tensors, "auto")
    assert got.dtype == tensors["values"].dtype


def test_float64_gradients_are_refused_by_edges():
    G, W_dec, where = (
        draw("normal", 1, 1, 3, dtype=torch.float64),
        draw("normal", 2, 3),
        torch.zeros(1).long(),
    )
    with pytest.raises(
        ValueError, match=r"impl='triton': expected float16, bfloat16 or float32, got torch\.float64"
    ):
        ops.edges(G, W_dec, where, where, torch.ones(1), impl="triton")
