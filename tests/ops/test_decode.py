"""decode: against loops in float64, on both layouts, with every gradient."""

import pytest
import torch
from torch import Tensor

from fasttc import ops
from fasttc.testing import PATTERNS, assert_same_bits, assert_within_budget, draw, draw_acts, draw_coder

SHAPES = [  # N, K, F, D_out
    pytest.param((1, 1, 1, 1), id="one-of-each"),
    pytest.param((7, 3, 13, 5), id="primes"),
    pytest.param((5, 11, 11, 4), id="K=F"),
    pytest.param((0, 2, 5, 3), id="empty-batch"),
    pytest.param((33, 8, 130, 17), id="odd-of-blocks"),
]
LAYOUTS = pytest.mark.parametrize("csr", [False, True], ids=["padded", "csr"])


def by_hand(acts: ops.SparseActs, W_dec: Tensor, b_dec: Tensor | None, init: Tensor | None) -> Tensor:
    out = torch.zeros(acts.n_tokens, W_dec.shape[1], dtype=torch.float64)
    entries = zip(acts.tokens.reshape(-1).tolist(), acts.indices.reshape(-1).tolist(), strict=True)
    for (token, feature), value in zip(entries, acts.values.reshape(-1).double().tolist(), strict=True):
        out[token] += value * W_dec[feature].double()
    for term in (b_dec, init):
        out = out if term is None else out + term.double()
    return out


def problem(shape, csr, dtype=torch.float64, pattern="uniform", seed=0):
    n, k, f, d = shape
    acts = draw_acts(n, k, f, csr=csr, pattern=pattern, dtype=dtype, seed=seed)
    coder = draw_coder(f, 3, d, dtype=dtype, seed=seed + 1)
    return acts, coder["W_dec"], coder["b_dec"], draw("normal", n, d, dtype=dtype, seed=seed + 2)


@LAYOUTS
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("terms", ["bare", "bias", "init", "bias+init"])
@pytest.mark.parametrize("shape", SHAPES)
def test_by_hand(impl, shape, terms, pattern, csr):
    acts, W_dec, b_dec, init = problem(shape, csr, pattern=pattern)
    b_dec, init = (b_dec if "bias" in terms else None), (init if "init" in terms else None)
    got = ops.decode(acts, W_dec, b_dec, init=init, impl=impl)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, by_hand(acts, W_dec, b_dec, init), rtol=1e-12, atol=1e-12)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_weights_are_summed_in_float32(impl, dtype, csr):
    acts, W_dec, b_dec, init = problem((29, 16, 301, 40), csr, dtype)
    acts = ops.SparseActs(acts.values.float(), acts.indices, 301, acts.shape, acts.row_ptr)
    got = ops.decode(acts, W_dec, b_dec, init=init, impl=impl)
    assert got.dtype == torch.float32
    eager = acts.to_dense() @ W_dec.float() + b_dec.float() + init.float()
    assert_within_budget(got, by_hand(acts, W_dec, b_dec, init), eager)


@LAYOUTS
def test_tokens_without_features_get_the_bias_alone(impl, csr):
    values = torch.zeros(4, 0) if not csr else torch.zeros(0)
    row_ptr = torch.zeros(5, dtype=torch.int64) if csr else None
    acts = ops.SparseActs(values, values.int(), 6, (4,), row_ptr)
    W_dec = torch.ones(6, 3, requires_grad=True)
    out = ops.decode(acts, W_dec, torch.tensor([1.0, 2.0, 3.0]), impl=impl)
    assert out.tolist() == [[1.0, 2.0, 3.0]] * 4
    out.sum().backward()
    assert W_dec.grad is not None
    assert W_dec.grad.abs().max() == 0


def test_empty_rows_between_full_ones(impl):
    row_ptr = torch.tensor([0, 0, 2, 2, 3, 3])
    acts = ops.SparseActs(
        torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 1], dtype=torch.int32), 2, (5,), row_ptr
    )
    got = ops.decode(acts, torch.tensor([[1.0], [10.0]]), impl=impl)
    assert got.tolist() == [[0.0], [21.0], [0.0], [30.0], [0.0]]


@pytest.mark.parametrize("leading", [(), (2, 3), (2, 0, 3)])
def test_leading_dimensions_are_kept(impl, leading):
    coder = draw_coder(7, 5, 4)
    acts = ops.encode(draw("normal", *leading, 5), coder["W_enc"], coder["b_enc"], k=2, impl=impl)
    init = draw("normal", *leading, 4, seed=8)
    got = ops.decode(acts, coder["W_dec"], coder["b_dec"], init=init, impl=impl)
    assert got.shape == (*leading, 4)
    expected = acts.to_dense() @ coder["W_dec"] + coder["b_dec"] + init
    torch.testing.assert_close(got, expected)


@LAYOUTS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck_and_each_gradient_alone(impl, pattern, csr):
    acts, *others = problem((4, 2, 5, 3), csr, pattern=pattern)
    leaves = [tensor.requires_grad_() for tensor in (acts.values, *others)]

    def run(values: Tensor, W_dec: Tensor, b_dec: Tensor, init: Tensor) -> Tensor:
        now = ops.SparseActs(values, acts.indices, 5, acts.shape, acts.row_ptr)
        return ops.decode(now, W_dec, b_dec, init=init, impl=impl)

    assert torch.autograd.gradcheck(run, leaves)
    upstream = draw("normal", 4, 3, dtype=torch.float64, seed=6)
    together = torch.autograd.grad(run(*leaves), leaves, upstream)
    for which, expected in enumerate(together):
        alone = [leaf if i == which else leaf.detach() for i, leaf in enumerate(leaves)]
        (got,) = torch.autograd.grad(run(*alone), alone[which], upstream)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["uniform", "one_feature"])
def test_gradients_within_budget(impl, pattern, dtype, csr):
    acts, W_dec, b_dec, init = problem((61, 16, 101, 24), csr, dtype, pattern)
    values, upstream = acts.values.float(), draw("normal", 61, 24, seed=5)
    tokens, indices = acts.tokens, acts.indices.long()

    def dense(values: Tensor, W_dec: Tensor, b_dec: Tensor, init: Tensor) -> Tensor:
        scatter = torch.zeros(61, 101, dtype=values.dtype)
        return scatter.index_put((tokens, indices), values, accumulate=True) @ W_dec + b_dec + init

    def sparse(values: Tensor, W_dec: Tensor, b_dec: Tensor, init: Tensor) -> Tensor:
        now = ops.SparseActs(values, acts.indices, 101, acts.shape, acts.row_ptr)
        return ops.decode(now, W_dec, b_dec, init=init, impl=impl)

    def grads(run, tensors, compute) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        (run(*(compute(leaf) for leaf in leaves)) * compute(upstream)).sum().backward()
        return [leaf.grad for leaf in leaves]

    tensors = [values, W_dec, b_dec, init]
    got = grads(sparse, tensors, lambda t: t if t is not upstream else upstream)
    oracle = grads(dense, [tensor.double() for tensor in tensors], Tensor.double)
    eager = grads(dense, tensors, Tensor.float)
    for name, g, truth, plain in zip(("values", "W_dec", "b_dec", "init"), got, oracle, eager, strict=True):
        assert_within_budget(g, truth, plain, name=f"gradient of {name}")


@LAYOUTS
def test_features_without_tokens_get_exactly_zero(impl, csr):
    acts, W_dec, _, _ = problem((30, 3, 20, 5), csr, pattern="few_features")
    W_dec.requires_grad_()
    ops.decode(acts, W_dec, impl=impl).sum().backward()
    assert W_dec.grad is not None
    assert bool((W_dec.grad[:3] != 0).any())
    assert W_dec.grad[3:].abs().max() == 0


@LAYOUTS
def test_two_backwards_over_one_graph_agree(impl, csr):
    acts, W_dec, b_dec, init = problem((31, 5, 40, 9), csr, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (acts.values, W_dec, b_dec, init)]
    saved = [leaf.detach().clone() for leaf in leaves]
    out = ops.decode(acts, W_dec, b_dec, init=init, impl=impl)
    upstream = draw("normal", *out.shape, seed=5)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
    for leaf, before in zip(leaves, saved, strict=True):
        assert_same_bits(leaf, before, name="input after backward")


@LAYOUTS
def test_bitwise_equal_from_run_to_run(impl, csr):
    def run() -> list[Tensor]:
        acts, W_dec, *_ = problem((200, 8, 50, 16), csr, torch.float32, "duplicates")
        acts.values.requires_grad_(), W_dec.requires_grad_()
        out = ops.decode(acts, W_dec, impl=impl)
        out.square().sum().backward()
        return [out, acts.values.grad, W_dec.grad]

    first = run()
    for _ in range(3):
        for a, b in zip(run(), first, strict=True):
            assert_same_bits(a, b)


def test_encode_and_decode_compose(impl):
    """Gradients of the whole coder, against dense PyTorch in float64."""
    coder = {name: tensor.requires_grad_() for name, tensor in draw_coder(19, 5, dtype=torch.float64).items()}
    x = draw("normal", 12, 5, dtype=torch.float64, seed=4).requires_grad_()
    leaves = [x, *coder.values()]
    acts = ops.encode(x, coder["W_enc"], coder["b_enc"], k=4, impl=impl)
    got = torch.autograd.grad(
        ops.decode(acts, coder["W_dec"], coder["b_dec"], impl=impl).square().sum(), leaves
    )
    z = x @ coder["W_enc"].T + coder["b_enc"]
    mask = torch.zeros_like(z).scatter(-1, z.topk(4).indices, 1.0)
    dense = (z.relu() * mask) @ coder["W_dec"] + coder["b_dec"]
    for a, b in zip(got, torch.autograd.grad(dense.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


ACTS = draw_acts(3, 2, 6)
BAD = [
    ({"acts": torch.ones(3, 6)}, TypeError, "acts: expected SparseActs, got Tensor"),
    ({"W_dec": torch.ones(6)}, ValueError, r"W_dec: expected shape \[F, D_out\], got \[6\]"),
    ({"W_dec": torch.ones(5, 4)}, ValueError, r"W_dec: expected 6 rows .* got 5"),
    ({"W_dec": torch.ones(6, 4).int()}, TypeError, "W_dec: expected float16, .* got torch.int32"),
    ({"b_dec": torch.ones(5)}, ValueError, r"b_dec: expected shape \[4\], got \[5\]"),
    ({"init": torch.ones(3, 5)}, ValueError, r"init: expected shape \[\.\.\., 4\], got \[3, 5\]"),
    ({"init": torch.ones(2, 4)}, ValueError, r"init: expected shape \[3, 4\], got \[2, 4\]"),
    ({"init": torch.ones(4)}, ValueError, r"init: expected shape \[3, 4\], got \[4\]"),
    (
        {"b_dec": torch.ones(4, device="meta")},
        ValueError,
        "expected all tensors on one device, got .* b_dec on meta",
    ),
    ({"impl": "dense"}, ValueError, "impl: expected one of auto, reference, torch, triton, got 'dense'"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[match[:40] for _, _, match in BAD])
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        ops.decode(**{"acts": ACTS, "W_dec": torch.ones(6, 4), **change})
