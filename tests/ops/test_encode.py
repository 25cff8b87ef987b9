"""encode: selection checked against loops over float64 pre-activations, gradients against closed formulas."""

import math

import pytest
import torch
from torch import Tensor

from fasttc import ops
from fasttc.testing import KINDS, assert_same_bits, assert_within_budget, draw, draw_coder

SHAPES = [  # N, D, F, K
    pytest.param((1, 1, 1, 1), id="one-of-each"),
    pytest.param((7, 5, 13, 3), id="primes"),
    pytest.param((5, 4, 11, 11), id="K=F"),
    pytest.param((0, 3, 5, 2), id="empty-batch"),
    pytest.param((33, 16, 130, 8), id="odd-of-blocks"),
    pytest.param((3, 2, 257, 1), id="K=1"),
]


def problem(shape, kind="normal", dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    n, d, f, _ = shape
    coder = draw_coder(f, d, kind=kind, dtype=dtype, seed=seed + 1)
    return draw(kind, n, d, dtype=dtype, seed=seed), coder["W_enc"], coder["b_enc"]


def pre(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    return x.double() @ W_enc.double().T + b_enc.double()


def rows_of(acts: ops.SparseActs) -> list[dict[int, float]]:
    """Per token {feature: value}, every stored entry, closed slots included."""
    values, tokens, features = acts.values.reshape(-1), acts.tokens.reshape(-1), acts.indices.reshape(-1)
    rows: list[dict[int, float]] = [{} for _ in range(acts.n_tokens)]
    for token, feature, value in zip(tokens.tolist(), features.tolist(), values.tolist(), strict=True):
        assert feature not in rows[token], f"feature {feature} occurs twice in token {token}"
        assert not rows[token] or feature > max(rows[token]), f"indices of token {token} do not ascend"
        rows[token][feature] = value
    return rows


def assert_rows(acts: ops.SparseActs, expected: list[dict[int, float]], tolerance: float = 1e-12) -> None:
    got = rows_of(acts)
    assert len(got) == len(expected)
    for token, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert mine.keys() == theirs.keys(), f"token {token}: got {sorted(mine)}, expected {sorted(theirs)}"
        for feature, value in theirs.items():
            assert math.isclose(mine[feature], value, rel_tol=tolerance, abs_tol=tolerance), (token, feature)


def by_hand_topk(z: Tensor, k: int, relu: bool) -> list[dict[int, float]]:
    best = [sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))[:k] for row in z.tolist()]
    return [
        {j: max(row[j], 0.0) if relu else row[j] for j in js}
        for row, js in zip(z.tolist(), best, strict=True)
    ]


# --- TopK ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_by_hand(impl, shape, relu, kind):
    x, W_enc, b_enc = problem(shape, kind)
    acts = ops.encode(x, W_enc, b_enc, k=shape[3], relu=relu, impl=impl)
    assert_rows(acts, by_hand_topk(pre(x, W_enc, b_enc), shape[3], relu))
    assert acts.indices.dtype == torch.int32
    assert acts.values.dtype == torch.float64


def test_all_ties_take_the_lowest_indices(impl):
    x, W_enc, b_enc = torch.ones(6, 3), torch.ones(40, 3), torch.zeros(40)
    acts = ops.encode(x, W_enc, b_enc, k=5, impl=impl)
    assert acts.indices.tolist() == [[0, 1, 2, 3, 4]] * 6
    assert acts.values.tolist() == [[3.0] * 5] * 6


def test_ties_at_the_border_take_the_lowest_indices(impl):
    z = torch.tensor([[1.0, 2.0, 1.0, 3.0, 1.0, 1.0]])  # two slots left for four equal values
    acts = ops.encode(z, torch.eye(6), torch.zeros(6), k=4, impl=impl)
    assert acts.indices.tolist() == [[0, 1, 2, 3]]


def test_minus_zero_counts_as_zero_and_comes_out_as_zero(impl):
    x = torch.tensor([[-0.0, 0.0, -0.0, -1.0]])
    acts = ops.encode(x, torch.eye(4), torch.full((4,), -0.0), k=3, relu=False, impl=impl)
    assert acts.indices.tolist() == [[0, 1, 2]]
    assert_same_bits(acts.values, torch.zeros(1, 3))


def test_closed_slots_keep_their_index_with_value_zero(impl):
    z = torch.tensor([[-1.0, -3.0, 2.0, -2.0]])
    acts = ops.encode(z, torch.eye(4), torch.zeros(4), k=3, impl=impl)
    assert acts.indices.tolist() == [[0, 2, 3]]
    assert acts.values.tolist() == [[0.0, 2.0, 0.0]]
    assert acts.l0().tolist() == [1.0]
    signed = ops.encode(z, torch.eye(4), torch.zeros(4), k=3, relu=False, impl=impl)
    assert signed.values.tolist() == [[-1.0, 2.0, -2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "heavy_tailed"])
def test_half_precision_inputs_are_selected_and_summed_in_float32(impl, dtype, kind):
    shape = (29, 64, 301, 11)
    x, W_enc, b_enc = problem(shape, kind, dtype)
    acts = ops.encode(x, W_enc, b_enc, k=11, impl=impl)
    assert acts.values.dtype == torch.float32
    z64, z32 = pre(x, W_enc, b_enc), x.float() @ W_enc.float().T + b_enc.float()
    # Sorted values move no further than the pre-activations do, so near-ties need no exception.
    best64, best32 = (z.topk(11).values.relu() for z in (z64, z32))
    assert_within_budget(acts.values.sort(-1, descending=True).values, best64, best32, name="sorted values")
    at64, at32 = (z.gather(-1, acts.indices.long()).relu() for z in (z64, z32))
    assert_within_budget(acts.values, at64, at32, name="values at their indices")


# --- BatchTopK -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_topk_by_hand(impl, shape, relu, kind):
    n, _, f, k = shape
    x, W_enc, b_enc = problem(shape, kind)
    z = pre(x, W_enc, b_enc).tolist()
    best = sorted(((t, j) for t in range(n) for j in range(f)), key=lambda at: (-z[at[0]][at[1]], at))[
        : n * k
    ]
    expected: list[dict[int, float]] = [{} for _ in range(n)]
    for t, j in best:
        expected[t][j] = max(z[t][j], 0.0) if relu else z[t][j]
    acts = ops.encode(x, W_enc, b_enc, k=k, scope="batch", relu=relu, impl=impl)
    assert acts.is_csr
    assert_rows(acts, expected)


# --- thresholds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_feature", [True, False], ids=["vector", "scalar"])
@pytest.mark.parametrize("shape", SHAPES)
def test_jumprelu_by_hand(impl, shape, per_feature, kind):
    x, W_enc, b_enc = problem(shape, kind)
    theta = draw("ties", shape[2], dtype=torch.float64, seed=9) if per_feature else 1.0
    z = pre(x, W_enc, b_enc).tolist()
    limits = theta.tolist() if isinstance(theta, Tensor) else [theta] * shape[2]
    expected = [{j: v for j, v in enumerate(row) if v > limits[j]} for row in z]
    acts = ops.encode(x, W_enc, b_enc, threshold=theta, impl=impl)
    assert_rows(acts, expected)
    assert acts.row_ptr is not None
    assert acts.row_ptr.tolist() == [sum(len(row) for row in expected[:t]) for t in range(shape[0] + 1)]


@pytest.mark.parametrize(
    "theta", [1, 1.0, torch.tensor(1.0), torch.tensor([1, 1, 1]), torch.ones(3)], ids=repr
)
def test_the_comparison_is_strict_for_every_kind_of_threshold(impl, theta):
    acts = ops.encode(torch.tensor([1.0, 1.5, 0.5]), torch.eye(3), torch.zeros(3), threshold=theta, impl=impl)
    assert acts.indices.tolist() == [1]


def test_relu_is_threshold_zero_and_drops_zeros(impl):
    x = torch.tensor([[0.0, -0.0, 2.0, -1.0]])
    acts = ops.encode(x, torch.eye(4), torch.zeros(4), threshold=0.0, impl=impl)
    assert acts.indices.tolist() == [2]
    assert acts.gates is None


def test_negative_thresholds_let_negative_values_through(impl):
    acts = ops.encode(torch.tensor([[-0.5, -2.0]]), torch.eye(2), torch.zeros(2), threshold=-1.0, impl=impl)
    assert acts.to_dense().tolist() == [[-0.5, 0.0]]


def test_bandwidth_keeps_the_window_below_the_threshold_with_value_zero(impl):
    x = torch.tensor([[0.70, 0.96, 1.00, 1.04, 2.00]], dtype=torch.float64)
    acts = ops.encode(
        x, torch.eye(5).double(), torch.zeros(5).double(), threshold=1.0, bandwidth=0.1, impl=impl
    )
    assert acts.indices.tolist() == [1, 2, 3, 4]
    assert acts.values.tolist() == [0.0, 0.0, 1.04, 2.0]
    assert acts.gates is not None
    assert acts.gates.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert acts.l0().tolist() == [2.0]


# --- shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("options", [{"k": 2}, {"k": 2, "scope": "batch"}, {"threshold": 0.1}], ids=repr)
def test_leading_dimensions_are_kept(impl, leading, options):
    coder = draw_coder(7, 5)
    x = draw("normal", *leading, 5)
    acts = ops.encode(x, coder["W_enc"], coder["b_enc"], impl=impl, **options)
    assert acts.shape == leading
    assert acts.to_dense().shape == (*leading, 7)
    flat = ops.encode(x.reshape(-1, 5), coder["W_enc"], coder["b_enc"], impl=impl, **options)
    assert_same_bits(acts.to_dense().reshape(-1, 7), flat.to_dense())


def test_strided_inputs_are_read_as_they_are(impl):
    x, W_enc, b_enc = problem((6, 5, 9, 2))
    turned, every_other = x.T.contiguous().T, b_enc.repeat_interleave(2)[::2]
    assert not turned.is_contiguous()
    strided = ops.encode(turned, W_enc.T.contiguous().T, every_other, k=2, impl=impl)
    assert_rows(strided, by_hand_topk(pre(x, W_enc, b_enc), 2, True))


# --- gradients -------------------------------------------------------------------------------------------------

OPTIONS = [
    {"k": 3},
    {"k": 3, "relu": False},
    {"k": 2, "scope": "batch"},
    {"k": 2, "scope": "batch", "relu": False},
    {"threshold": 0.0},
    {"threshold": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_gradcheck_and_each_gradient_alone(impl, options):
    leaves = [tensor.requires_grad_() for tensor in problem((4, 3, 7, 3))]

    def values(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        return ops.encode(x, W_enc, b_enc, impl=impl, **options).values

    assert torch.autograd.gradcheck(values, leaves)
    upstream = draw("normal", *values(*leaves).shape, dtype=torch.float64, seed=6)
    together = torch.autograd.grad(values(*leaves), leaves, upstream)
    for which, expected in enumerate(together):
        alone = [leaf if i == which else leaf.detach() for i, leaf in enumerate(leaves)]
        (got,) = torch.autograd.grad(values(*alone), alone[which], upstream)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"k": 11}, {"k": 5, "scope": "batch"}, {"threshold": 0.2}], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_within_budget(impl, dtype, options):
    inputs = problem((37, 24, 101, 11), dtype=dtype)
    with torch.no_grad():
        acts = ops.encode(*inputs, impl=impl, **options)
    tokens, indices = acts.tokens, acts.indices.long()
    upstream = draw("normal", *acts.values.shape, seed=5)

    def grads(tensors, compute_dtype, run) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        (run([leaf.to(compute_dtype) for leaf in leaves]) * upstream.to(compute_dtype)).sum().backward()
        return [leaf.grad for leaf in leaves]

    def dense(leaves) -> Tensor:  # the same selection, so that a near-tie cannot count as an error
        z = (leaves[0] @ leaves[1].T + leaves[2])[tokens, indices]
        return z * (acts.values != 0)

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    (ops.encode(*leaves, impl=impl, **options).values * upstream).sum().backward()
    oracle = grads([tensor.double() for tensor in inputs], torch.float64, dense)
    eager = grads(inputs, torch.float32, dense)
    for name, leaf, truth, plain in zip(("x", "W_enc", "b_enc"), leaves, oracle, eager, strict=True):
        assert leaf.grad is not None
        assert_within_budget(leaf.grad, truth, plain, name=f"gradient of {name}")


def test_features_without_tokens_get_exactly_zero(impl):
    x, W_enc, b_enc = problem((9, 4, 12, 2))
    b_enc = b_enc.index_fill(0, torch.tensor([0, 5, 11]), -1e6)
    W_enc.requires_grad_(), b_enc.requires_grad_()
    ops.encode(x, W_enc, b_enc, k=2, impl=impl).values.sum().backward()
    assert W_enc.grad is not None
    assert b_enc.grad is not None
    for f in (0, 5, 11):
        assert W_enc.grad[f].tolist() == [0.0] * 4
        assert b_enc.grad[f].item() == 0.0


def test_a_feature_hit_by_every_token_sums_them_all(impl):
    x, W_enc, b_enc = problem((41, 4, 12, 2))
    b_enc[7] = 1e3
    W_enc.requires_grad_(), b_enc.requires_grad_()
    ops.encode(x, W_enc, b_enc, k=1, impl=impl).values.sum().backward()
    assert W_enc.grad is not None
    assert b_enc.grad is not None
    torch.testing.assert_close(W_enc.grad[7], x.sum(0), rtol=1e-12, atol=1e-12)
    assert b_enc.grad.tolist() == [0.0] * 7 + [41.0] + [0.0] * 4


def _threshold_setup(seed=0):
    x, W_enc, b_enc = problem((50, 6, 8, 0), seed=seed)
    theta = draw("normal", 8, dtype=torch.float64, seed=seed + 7).abs() * 0.3 + 0.1
    z = pre(x, W_enc, b_enc)
    eps = 0.6
    window = ((z - theta).abs() < eps / 2).double()
    assert bool(((z > theta) * window).any())
    assert bool(((z < theta) * window).any())
    return x, W_enc, b_enc, theta, z, eps, window


def test_threshold_gradient_through_values(impl):
    x, W_enc, b_enc, theta, _, eps, window = _threshold_setup()
    upstream = draw("normal", 50, 8, dtype=torch.float64, seed=3)
    theta.requires_grad_()
    acts = ops.encode(x, W_enc, b_enc, threshold=theta, bandwidth=eps, impl=impl)
    (acts.to_dense() * upstream).sum().backward()
    expected = -(theta.detach() / eps) * (window * upstream).sum(0)
    torch.testing.assert_close(theta.grad, expected, rtol=1e-12, atol=1e-12)


def test_threshold_gradient_through_l0(impl):
    x, W_enc, b_enc, theta, _, eps, window = _threshold_setup()
    weights = draw("normal", 50, dtype=torch.float64, seed=4)
    theta.requires_grad_()
    acts = ops.encode(x, W_enc, b_enc, threshold=theta, bandwidth=eps, impl=impl)
    (acts.l0() * weights).sum().backward()
    torch.testing.assert_close(theta.grad, -(window * weights[:, None]).sum(0) / eps, rtol=1e-12, atol=1e-12)


def test_threshold_gradient_of_a_scalar_is_summed_over_features(impl):
    x, W_enc, b_enc, _, z, eps, _ = _threshold_setup()
    theta = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    ops.encode(x, W_enc, b_enc, threshold=theta, bandwidth=eps, impl=impl).l0().sum().backward()
    assert theta.grad is not None
    assert theta.grad.item() == pytest.approx(-float(((z - 0.25).abs() < eps / 2).sum()) / eps, rel=1e-12)


@pytest.mark.parametrize("theta_learns", [True, False])
def test_jumprelu_gradients_of_the_inputs_are_those_of_the_open_gates(impl, theta_learns):
    x, W_enc, b_enc, theta, z, eps, _ = _threshold_setup()
    upstream = draw("normal", 50, 8, dtype=torch.float64, seed=3)
    for tensor in (x, W_enc, b_enc):
        tensor.requires_grad_()
    bandwidth = eps if theta_learns else None
    acts = ops.encode(x, W_enc, b_enc, threshold=theta, bandwidth=bandwidth, impl=impl)
    (acts.to_dense() * upstream).sum().backward()
    dz = upstream * (z > theta)
    for got, expected in ((x.grad, dz @ W_enc), (W_enc.grad, dz.T @ x), (b_enc.grad, dz.sum(0))):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-12)


def test_without_bandwidth_the_threshold_gets_no_gradient(impl):
    x, W_enc, b_enc, theta, *_ = _threshold_setup()
    theta.requires_grad_(), x.requires_grad_()
    ops.encode(x, W_enc, b_enc, threshold=theta, impl=impl).values.sum().backward()
    assert theta.grad is None


# --- repetition ------------------------------------------------------------------------------------------------

EVERY = [*OPTIONS, {"threshold": 0.3, "bandwidth": 0.4}]


@pytest.mark.parametrize("options", EVERY, ids=repr)
def test_two_backwards_over_one_graph_agree(impl, options):
    leaves = [tensor.requires_grad_() for tensor in problem((23, 6, 31, 0), dtype=torch.float32)]
    saved = [leaf.detach().clone() for leaf in leaves]
    values = ops.encode(*leaves, impl=impl, **options).values
    upstream = draw("normal", *values.shape, seed=5)
    first = torch.autograd.grad(values, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(values, leaves, upstream, retain_graph=True)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
    for leaf, before in zip(leaves, saved, strict=True):
        assert_same_bits(leaf, before, name="input after backward")


@pytest.mark.parametrize("options", EVERY, ids=repr)
def test_bitwise_equal_from_run_to_run(impl, options):
    def run() -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in problem((64, 8, 50, 0), "ties", torch.float32)]
        acts = ops.encode(*leaves, impl=impl, **options)
        acts.values.square().sum().backward()
        return [acts.values, acts.indices, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    first = run()
    for _ in range(3):
        for a, b in zip(run(), first, strict=True):
            assert_same_bits(a, b)
