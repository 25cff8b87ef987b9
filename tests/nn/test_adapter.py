"""Adapters: how they start, what they compute, features switched without touching weights, and their files."""

import pytest
import torch

from fasttc.nn import AdapterSet, Site, Transcoder, TranscoderAdapter, TranscoderSet, io
from fasttc.testing import assert_same_bits, assert_within_budget, draw

D, F = 7, 13


def sites(layers=(0, 2)) -> list[Site]:
    return [Site(layer, "mlp_in", "mlp_out") for layer in layers]


def make(layers=(0, 2), dtype=torch.float64) -> AdapterSet:
    torch.manual_seed(1)
    adapters = [TranscoderAdapter(D, F, dtype=dtype).eval() for _ in layers]
    for adapter in adapters:
        for parameter in (adapter.b_enc, adapter.W_dec, adapter.b_dec):
            torch.nn.init.normal_(parameter)
    return AdapterSet(adapters, sites(layers), {"target": "tiny"})


def by_hand(adapter, x, factors=1.0):
    f = torch.relu(x @ adapter.W_enc.T + adapter.b_enc) * factors
    return f @ adapter.W_dec + adapter.b_dec


def test_a_new_adapter_adds_nothing_and_draws_its_encoder_from_a_seed():
    torch.manual_seed(3)
    adapter = TranscoderAdapter(64, 500)
    assert torch.equal(adapter(draw("normal", 9, 64)), torch.zeros(9, 64))
    bound = 64**-0.5
    assert adapter.W_enc.abs().max() <= bound
    spread = bound / 3**0.5  # of a uniform variable; its estimate has a relative error of about 0.4 %
    assert abs(float(adapter.W_enc.detach().std()) - spread) < 0.02 * spread
    torch.manual_seed(3)
    assert_same_bits(TranscoderAdapter(64, 500).W_enc, adapter.W_enc)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_is_the_formula(shape, dtype):
    adapter = make(dtype=dtype)[0]
    x = draw("normal", *shape, D, dtype=dtype)
    wide = {name: value.double() for name, value in adapter.state_dict().items()}
    oracle = torch.relu(x.double() @ wide["W_enc"].T + wide["b_enc"]) @ wide["W_dec"] + wide["b_dec"]
    assert_within_budget(adapter(x), oracle, by_hand(adapter, x))


def test_gradients_are_those_of_the_formula():
    adapter, x = make()[0], draw("normal", 6, D, dtype=torch.float64)
    weight = draw("normal", 6, D, dtype=torch.float64, seed=1)
    found = torch.autograd.grad((adapter(x) * weight).sum(), list(adapter.parameters()))
    expected = torch.autograd.grad((by_hand(adapter, x) * weight).sum(), list(adapter.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        assert_within_budget(ours, theirs, theirs)


def test_factors_switch_features_and_share_the_weights():
    adapters = make()
    x = draw("normal", 20, D, dtype=torch.float64)
    changed = adapters.with_factors({(2, 4): 0.0, (2, 5): 3.0, (2, 6): -1.0})
    factors = torch.ones(F, dtype=torch.float64)
    factors[4:7] = torch.tensor([0.0, 3.0, -1.0])
    expected = by_hand(adapters[1], x, factors)
    assert_within_budget(changed[1](x), expected, expected)
    assert_same_bits(changed[0](x), adapters[0](x))
    assert changed[1].encode(x).to_dense()[:, 4].count_nonzero() == 0
    assert adapters[1].encode(x).to_dense()[:, 4].count_nonzero() > 0
    with torch.no_grad():
        adapters[1].b_dec += 1
    assert_within_budget(changed[1](x), expected + 1, expected + 1)
    assert adapters[1].factors is None


def test_factors_multiply():
    twice = make().with_factors({(0, 1): 2.0}).with_factors({(0, 1): -3.0, (0, 2): 5.0})
    assert twice[0].factors is not None
    assert twice[0].factors[:4].tolist() == [1, -6, 5, 1]


def test_ablated_and_only_are_complements():
    adapters, chosen = make(), [(0, 1), (2, 3), (2, 8)]
    x = draw("normal", 20, D, dtype=torch.float64)
    for whole, without, with_only in zip(
        adapters, adapters.ablated(chosen), adapters.only(chosen), strict=True
    ):
        both = without(x) + with_only(x) - whole.b_dec
        assert_within_budget(both, whole(x), both)


def test_scaled_turns_the_decoder_round_and_leaves_the_original():
    adapters, x = make(), draw("normal", 20, D, dtype=torch.float64)
    before = adapters[0](x)
    assert_within_budget(adapters.scaled(-0.5)[0](x), -0.5 * before, -0.5 * before)
    assert_same_bits(adapters[0](x), before)


@pytest.mark.parametrize("feature", [(1, 0), (0, F), (2, -1)])
def test_features_that_are_not_there(feature):
    with pytest.raises(
        ValueError, match=r"features: expected \(layer, feature\) of AdapterSet\(2 layers 0..2"
    ):
        make().ablated([feature])


def test_round_trip_and_that_factors_are_not_saved(tmp_path):
    adapters = make(dtype=torch.float32)
    adapters.ablated([(0, 1)]).save_pretrained(tmp_path / "set")
    again = AdapterSet.from_pretrained(tmp_path / "set")
    assert (again.sites, again.metadata) == (adapters.sites, adapters.metadata)
    x = draw("normal", 5, D)
    for before, after in zip(adapters, again, strict=True):
        assert isinstance(after, TranscoderAdapter)
        assert after.factors is None
        assert_same_bits(after(x), before(x))


def test_kinds_never_pass_for_one_another(tmp_path):
    make().save_pretrained(tmp_path / "adapters")
    TranscoderSet([Transcoder(D, F, k=2)], [Site(0)]).save_pretrained(tmp_path / "transcoders")
    assert io.kind_of(tmp_path / "adapters") == "adapters"
    with pytest.raises(ValueError, match=r"expected a set of transcoders, .* holds adapters"):
        TranscoderSet.from_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match=r"expected a set of adapters, .* holds transcoders"):
        AdapterSet.from_pretrained(tmp_path / "transcoders")


def test_construction_is_checked():
    with pytest.raises(TypeError, match="adapters: expected TranscoderAdapter, got Transcoder"):
        AdapterSet([Transcoder(D, F, k=2)], sites([0]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match="read mlp_in and write mlp_out, layer 0 reads mlp_in and writes mlp_out_post"
    ):
        AdapterSet([TranscoderAdapter(D, F)], [Site(0, "mlp_in", "mlp_out_post")])
    with pytest.raises(ValueError, match="expected activation 'relu' without a skip connection"):
        TranscoderAdapter.from_config(Transcoder(D, F, k=2).config)
