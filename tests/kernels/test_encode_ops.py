"""Encode with impl="triton": gradients against the oracle, two backward passes, torch.library and torch.compile."""

import pytest
import torch

from fasttc import ops
from fasttc.ops import _triton_encode
from fasttc.testing import assert_same_bits, assert_within_budget, draw, draw_coder

N, D, F = 5, 11, 67
CASES = {
    "topk": {"k": 6},
    "topk without relu": {"k": 40, "relu": False},
    "topk with closed slots": {"k": 60},
    "batch": {"k": 6, "scope": "batch"},
    "relu": {"threshold": 0.0},
    "jumprelu": {"threshold": "vector", "bandwidth": 1.0},
    "one threshold": {"threshold": "scalar", "bandwidth": 0.7},
}


def leaves_of(case, dtype=torch.float32):
    """x, W_enc, b_enc and, where the case learns one, θ: leaves that require gradients."""
    made = draw_coder(F, D, dtype=dtype)
    tensors = [draw("normal", N, D, dtype=dtype, seed=3), made["W_enc"], made["b_enc"]]
    if case.get("threshold") == "vector":
        tensors.append(0.5 * draw("normal", F, seed=4).abs())
    if case.get("threshold") == "scalar":
        tensors.append(torch.tensor(0.4))
    return [t.requires_grad_() for t in tensors]


def run(impl, case, leaves, dtype=None):
    tensors = leaves if dtype is None else [t.detach().to(dtype).requires_grad_() for t in leaves]
    options = {**case, "threshold": tensors[3]} if len(tensors) > 3 else case
    acts = ops.encode(*tensors[:3], impl=impl, **options)
    weights = draw("normal", *acts.values.shape, seed=9).to(acts.values.dtype)
    loss = (acts.values * weights).sum()
    if acts.gates is not None:  # θ learns through the values and through L0
        loss = loss + (acts.l0() * torch.arange(1, N + 1)).sum()
    return acts, tensors, loss


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_every_gradient(case):
    leaves = leaves_of(case)
    got, _, loss = run("triton", case, leaves)
    grads = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    oracle, doubles, oracle_loss = run("reference", case, leaves, torch.float64)
    eager, singles, eager_loss = run("reference", case, leaves)
    assert_same_bits(got.indices, oracle.indices, name="indices")
    assert_within_budget(got.values, oracle.values, eager.values, magnitude=4.0, name="values")
    oracle_grads = torch.autograd.grad(oracle_loss, doubles)
    eager_grads = torch.autograd.grad(eager_loss, singles)
    names = ("x", "W_enc", "b_enc", "threshold")
    for name, mine, second, exact, plain in zip(names, grads, again, oracle_grads, eager_grads, strict=False):
        assert_within_budget(mine, exact, plain, name=f"gradient of {name}")
        assert_same_bits(mine, second, name=f"second gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_leaf(dtype):
    leaves = leaves_of(CASES["topk"], dtype)
    _, _, loss = run("triton", CASES["topk"], leaves)
    _, doubles, oracle_loss = run("reference", CASES["topk"], leaves, torch.float64)
    _, plain, eager_loss = run("reference", CASES["topk"], leaves)
    exact = torch.autograd.grad(oracle_loss, doubles)
    eager = torch.autograd.grad(eager_loss, plain)
    for mine, right, same in zip(torch.autograd.grad(loss, leaves), exact, eager, strict=True):
        assert_within_budget(mine, right, same)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone(wanted):
    leaves = leaves_of(CASES["topk"])
    _, _, loss = run("triton", CASES["topk"], leaves)
    whole = torch.autograd.grad(loss, leaves, retain_graph=True)[wanted]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wanted)
    _, _, loss = run("triton", CASES["topk"], leaves)
    assert_same_bits(torch.autograd.grad(loss, leaves[wanted])[0], whole)


@pytest.mark.parametrize("case", ["topk", "jumprelu"])
def test_an_empty_batch_has_zero_gradients(case):
    leaves = leaves_of(CASES[case])
    options = {**CASES[case], "threshold": leaves[3]} if len(leaves) > 3 else CASES[case]
    acts = ops.encode(leaves[0][:0], *leaves[1:3], impl="triton", **options)
    assert acts.shape == (0,)
    grads = torch.autograd.grad(acts.values.sum(), leaves[1:3])
    assert all(bool((g == 0).all()) for g in grads)


def test_a_dense_backward_gives_the_same_gradients():
    x, W, b = (t.detach() for t in leaves_of(CASES["topk"]))
    grads = []
    for dense in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, W, b)]
        values, _ = _triton_encode.encode_topk(*leaves, 6, True, "tile", dense)
        grads.append(torch.autograd.grad((values * draw("normal", N, 6, seed=9)).sum(), leaves))
    for sparse, dense in zip(*grads, strict=True):
        assert_within_budget(dense, sparse.double(), sparse, magnitude=4.0)


def test_the_scratch_is_bounded_by_an_environment_variable(monkeypatch):
    leaves = [t.detach() for t in leaves_of(CASES["topk"])]
    expected = ops.encode(*leaves, k=3, impl="reference")
    for megabytes in ("0", "1"):
        monkeypatch.setenv("FASTTC_SCRATCH_MB", megabytes)
        assert_same_bits(ops.encode(*leaves, k=3, impl="triton").indices, expected.indices)
    monkeypatch.setenv("FASTTC_SCRATCH_MB", "lots")
    with pytest.raises(
        ValueError, match="FASTTC_SCRATCH_MB: expected a whole number of mebibytes, got 'lots'"
    ):
        ops.encode(*leaves, k=3, impl="triton")


def test_float64_is_refused():
    leaves = [t.detach().double() for t in leaves_of(CASES["topk"])]
    with pytest.raises(ValueError, match=r"expected float16, bfloat16 or float32, got torch\.float64"):
        ops.encode(*leaves, k=3, impl="triton")
    with pytest.raises(ValueError, match=r"expected float16, bfloat16 or float32, got torch\.float64"):
        ops.encode(leaves[0].float(), *leaves[1:], k=3, impl="triton")


OPS = {
    "topk": lambda x, W, b, theta: (_triton_encode.encode_topk, (x, W, b, 4, True, "tile")),
    "batch": lambda x, W, b, theta: (_triton_encode.encode_batch_topk, (x, W, b, 4, True, "vendor")),
    "threshold": lambda x, W, b, theta: (_triton_encode.encode_threshold, (x, W, b, theta, 1.0, "tile")),
}


@pytest.mark.parametrize("op", OPS)
def test_registration(op):
    small = [t.detach()[:, :3].clone() if t.dim() == 2 else t.detach() for t in leaves_of(CASES["jumprelu"])]
    leaves = [small[0][:2], *(t[:20] for t in small[1:])]
    function, arguments = OPS[op](*(t.clone().requires_grad_() for t in leaves))
    torch.library.opcheck(function, arguments)


@pytest.mark.parametrize("case", ["topk", "batch", "jumprelu"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_without_a_graph_break(case):
    leaves = leaves_of(CASES[case])

    def values(x, W, b, *theta):
        options = {**CASES[case], "threshold": theta[0]} if theta else CASES[case]
        return ops.encode(x, W, b, impl="triton", **options).values

    compiled = torch.compile(values, fullgraph=True, backend="aot_eager")(*leaves)
    eager = values(*leaves)
    assert_same_bits(compiled, eager)
    for one, other in zip(
        *(torch.autograd.grad(v.square().sum(), leaves) for v in (compiled, eager)), strict=True
    ):
        assert_same_bits(one, other)
