"""Transcoder: every activation, skip and dtype against dense formulas; the BatchTopK threshold; errors."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fasttc
from fasttc.nn import Transcoder, TranscoderConfig
from fasttc.testing import assert_same_bits, assert_within_budget, draw

D, FEATURES, D_OUT, K = 10, 37, 6, 5
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu")


def make(activation="topk", skip=False, dtype=torch.float64, seed=0, d_out=D_OUT, **options) -> Transcoder:
    tc = Transcoder(D, FEATURES, d_out, activation, K, skip, dtype=dtype, **options)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(tc.named_parameters()):
            parameter.copy_(draw("normal", *parameter.shape, dtype=dtype, seed=seed + number, scale=0.4))
            if name == "threshold":
                parameter.abs_()
    return tc


def gates(tc: Transcoder, z: Tensor) -> Tensor:
    """Which features are open, from dense pre-activations [N, F]: the definition of each activation."""
    if tc.activation == "topk":
        return torch.zeros_like(z).scatter(-1, z.topk(K).indices, 1.0) * (z > 0 if tc.config.relu else 1)
    if tc.activation == "batchtopk" and tc.training:
        flat = torch.zeros(z.numel(), dtype=z.dtype)
        flat[z.reshape(-1).topk(len(z) * K).indices] = 1.0
        return flat.reshape(z.shape) * (z > 0)
    return (z > (0.0 if tc.threshold is None else tc.threshold)).to(z.dtype)


def dense(tc: Transcoder, x: Tensor, open_: Tensor | None = None) -> Tensor:
    z = F.linear(x, tc.W_enc, tc.b_enc)
    y = (z * (gates(tc, z) if open_ is None else open_)) @ tc.W_dec + tc.b_dec
    return y if tc.W_skip is None else y + F.linear(x, tc.W_skip)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_equals_the_dense_formula(activation, skip, training):
    tc = make(activation, skip).train(training)
    if activation == "batchtopk":
        tc.threshold.fill_(0.3)
    x = draw("normal", 23, D, dtype=torch.float64, seed=9)
    torch.testing.assert_close(tc(x), dense(tc, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tc.pre_activations(x), x @ tc.W_enc.T + tc.b_enc, rtol=1e-12, atol=1e-12)


def test_topk_without_relu_keeps_negative_values():
    tc = make("topk", relu=False)
    with torch.no_grad():
        tc.b_enc.fill_(-50.0)
    x = draw("normal", 4, D, dtype=torch.float64)
    assert bool((tc.encode(x).values < 0).all())
    torch.testing.assert_close(tc(x), dense(tc, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_low_precision_stays_within_budget(activation, skip, dtype):
    tc = make(activation, skip, dtype).eval()
    if activation == "batchtopk":
        tc.threshold.fill_(0.3)
    x = draw("normal", 31, D, dtype=dtype, seed=9)
    open_ = (tc.encode(x).to_dense() != 0).double()
    exact = make(activation, skip).eval()
    exact.load_state_dict({name: value.double() for name, value in tc.state_dict().items()})
    got = tc(x)
    assert got.dtype == dtype
    assert_within_budget(got, dense(exact, x.double(), open_), dense(tc, x, open_.to(dtype)))


def test_the_output_has_the_dtype_of_the_input():
    x = draw("normal", 3, D, dtype=torch.bfloat16)
    tc = make(dtype=torch.float32)
    assert tc(x).dtype == torch.bfloat16
    assert tc.encode(x).values.dtype == torch.float32
    torch.testing.assert_close(tc(x), tc(x.float()).bfloat16(), rtol=0, atol=0)
    assert make(dtype=torch.bfloat16)(x.float()).dtype == torch.float32


@pytest.mark.parametrize("leading", [(), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_leading_dimensions(leading, skip):
    tc = make(skip=skip)
    x = draw("normal", *leading, D, dtype=torch.float64)
    assert tc(x).shape == (*leading, D_OUT)
    assert tc.pre_activations(x).shape == (*leading, FEATURES)
    torch.testing.assert_close(tc(x).reshape(-1, D_OUT), tc(x.reshape(-1, D)), rtol=0, atol=0)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_parameter_learns(activation, skip):
    tc = make(activation, skip).train()
    if activation == "jumprelu":
        tc.threshold.data.fill_(0.05)
    x = draw("normal", 64, D, dtype=torch.float64, seed=9).requires_grad_()
    acts = tc.encode(x)
    (tc.decode(acts, x).square().sum() + acts.l0().sum()).backward()
    assert x.grad is not None
    for name, parameter in tc.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu"])
def test_gradients_equal_those_of_the_dense_formula(activation, skip):
    tc = make(activation, skip).train()
    x = draw("normal", 23, D, dtype=torch.float64, seed=9).requires_grad_()
    leaves = [x, *tc.parameters()]
    got = torch.autograd.grad(tc(x).square().sum(), leaves)
    expected = torch.autograd.grad(dense(tc, x).square().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_jumprelu_window_is_open_only_while_learning():
    tc = make("jumprelu", bandwidth=0.5)
    x = draw("normal", 20, D, dtype=torch.float64)
    assert tc.train().encode(x).gates is not None
    with torch.no_grad():
        assert tc.encode(x).gates is None
    learning, fixed = tc.train().encode(x), tc.eval().encode(x)
    assert fixed.gates is None
    assert learning.values.numel() > fixed.values.numel()
    assert torch.equal(learning.to_dense(), fixed.to_dense())


# --- BatchTopK -------------------------------------------------------------------------------------------------


def test_batchtopk_counts_over_the_batch_and_tracks_the_smallest_kept_value():
    tc = make("batchtopk").train()
    batches = [draw("normal", 16, D, dtype=torch.float64, seed=seed) for seed in (1, 2, 3)]
    expected = 0.0
    for x in batches:
        acts = tc.encode(x)
        assert int(acts.l0().sum()) == 16 * K
        assert len(set(acts.l0().tolist())) > 1
        smallest = tc.pre_activations(x).reshape(-1).topk(16 * K).values.min().item()
        assert smallest > 0
        expected = smallest if expected == 0.0 else 0.99 * expected + 0.01 * smallest
        assert tc.threshold.item() == pytest.approx(expected, rel=1e-12)


def test_batchtopk_in_evaluation_is_a_jumprelu_that_no_neighbour_changes():
    tc = make("batchtopk").train()
    x = draw("normal", 16, D, dtype=torch.float64, seed=1)
    tc.encode(x)
    tc.threshold *= (
        1 - 1e-9
    )  # the first batch left it at one of its own values: off the tie that rounding decides
    before = tc.threshold.clone()
    tc.eval()
    together = tc.encode(x).to_dense()
    alone = torch.stack([tc.encode(row).to_dense() for row in x])
    assert_same_bits((together != 0).int(), (alone != 0).int())
    z = tc.pre_activations(x)
    assert torch.equal(together != 0, z > before)
    assert_same_bits(tc.threshold, before)


def test_batchtopk_threshold_is_saved_but_does_not_learn():
    tc = make("batchtopk")
    assert "threshold" in tc.state_dict()
    assert "threshold" not in dict(tc.named_parameters())
    assert tc.threshold.dtype == torch.float64


def test_batchtopk_ignores_a_batch_without_positive_values():
    tc = make("batchtopk").train()
    with torch.no_grad():
        tc.b_enc.fill_(-100.0)
    acts = tc.encode(draw("normal", 4, D, dtype=torch.float64))
    assert acts.l0().sum() == 0
    assert tc.threshold.item() == 0.0


# --- construction ----------------------------------------------------------------------------------------------


def test_initial_weights():
    tc = fasttc.Transcoder(8, 20, activation="jumprelu", skip=True, bandwidth=0.2)
    torch.testing.assert_close(tc.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(tc.W_enc, tc.W_dec)
    for zero in (tc.b_enc, tc.b_dec, tc.W_skip):
        assert zero.abs().max() == 0
    assert tc.threshold.tolist() == pytest.approx([0.2] * 20)
    assert fasttc.Transcoder(8, 20, 5, k=3).W_enc.shape == (20, 8)
    torch.manual_seed(1)
    first = fasttc.Transcoder(8, 20, k=3).W_dec
    torch.manual_seed(1)
    assert_same_bits(fasttc.Transcoder(8, 20, k=3).W_dec, first)


def test_config_describes_the_transcoder():
    tc = make("topk", skip=True, relu=False)
    assert tc.config == TranscoderConfig(D, FEATURES, D_OUT, "topk", K, True, False, 0.1)
    assert TranscoderConfig.from_dict(tc.config.to_dict()) == tc.config
    assert (tc.d_in, tc.d_out, tc.n_features, tc.activation, tc.k, tc.skip) == (
        D,
        D_OUT,
        FEATURES,
        "topk",
        K,
        True,
    )
    assert make("relu").k is None
    assert repr(tc) == f"Transcoder({D} -> {FEATURES} -> {D_OUT}, topk, k={K}, skip)"


def test_dtype_and_device_reach_every_tensor():
    for activation in ACTIVATIONS:
        tc = Transcoder(4, 8, None, activation, 2, True, dtype=torch.bfloat16, device="meta")
        assert {tensor.dtype for tensor in tc.state_dict().values()} == {torch.bfloat16}
        assert all(tensor.is_meta for tensor in tc.state_dict().values())


GOOD = {"d_in": 4, "n_features": 8, "activation": "topk", "k": 2}
BAD = [
    ({"d_in": 0}, "d_in: expected a positive int, got 0"),
    ({"n_features": 8.0}, "n_features: expected a positive int, got 8.0"),
    ({"d_out": -1}, "d_out: expected a positive int, got -1"),
    ({"d_in": True}, "d_in: expected a positive int, got True"),
    ({"activation": "gelu"}, "activation: expected one of topk, batchtopk, jumprelu, relu, got 'gelu'"),
    ({"k": 9}, "k: expected 1 <= k <= n_features = 8, got 9"),
    ({"k": 0}, "k: expected 1 <= k <= n_features = 8, got 0"),
    ({"k": None}, "k: expected a positive int for activation 'topk', got None"),
    ({"k": 2.0, "activation": "batchtopk"}, "k: expected a positive int for activation 'batchtopk', got 2.0"),
    ({"bandwidth": 0.0}, "bandwidth: expected a number > 0, got 0.0"),
    ({"bandwidth": math.nan}, "bandwidth: expected a number > 0, got nan"),
]


@pytest.mark.parametrize(("change", "match"), BAD, ids=[match[:40] for _, match in BAD])
def test_bad_options_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        Transcoder(**{**GOOD, **change})


def test_bad_configurations_are_named():
    with pytest.raises(ValueError, match=r"k: expected None for activation 'relu', got 3"):
        TranscoderConfig(4, 8, 4, "relu", 3)
    with pytest.raises(ValueError, match=r"expected the fields \['d_in', .*got \{'width': 3\}"):
        TranscoderConfig.from_dict({"width": 3})


def test_bad_inputs_are_named():
    tc = make(skip=True)
    with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., 10\], got \[3, 9\]"):
        tc(torch.ones(3, 9))
    x = torch.ones(3, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x: expected the encoder's input .* got None"):
        tc.decode(tc.encode(x))
    with pytest.raises(ValueError, match=r"W_dec: expected 4 rows"):
        tc.decode(fasttc.ops.encode(x[:, :2], torch.ones(4, 2).double(), torch.ones(4).double(), k=1), x)
