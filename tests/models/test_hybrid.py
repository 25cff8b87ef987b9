"""hybrid() and steered(): the same numbers as a model rebuilt by hand, in every family; and nothing left behind."""

import copy

import pytest
import torch

from fasttc.models import adapter_sites, anatomy, check_same_tokenizer, hybrid, replaced, steered
from fasttc.nn import AdapterSet, TranscoderAdapter
from fasttc.testing import assert_same_bits


@pytest.fixture
def pair(tiny_model):
    """`pair(family)`: a target and a base that differ in every weight, float64."""
    return lambda family: (
        tiny_model(family, dtype=torch.float64),
        tiny_model(family, seed=1, dtype=torch.float64),
    )


def adapters_for(model, dtype=torch.float64) -> AdapterSet:
    torch.manual_seed(5)
    adapters = [TranscoderAdapter(32, 24, dtype=dtype).eval() for _ in range(3)]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.W_dec, std=0.3)
        torch.nn.init.normal_(adapter.b_dec, std=0.3)
    return AdapterSet(adapters, adapter_sites(model))


def rebuilt(target, base, layers=(0, 1, 2), adapters=None):
    """The hybrid as a model of its own: the target's copy with the base's MLP weights, adapters by hooks."""
    model = copy.deepcopy(target)
    for layer in layers:
        place = anatomy(model).layers[layer]
        mlp = model.get_submodule(place.mlp)
        mlp.load_state_dict(base.get_submodule(place.mlp).state_dict())
        if adapters is not None:
            mlp.register_forward_hook(
                lambda module, args, output, adapter=adapters[layer]: output + adapter(args[0])
            )
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_equals_the_model_rebuilt_by_hand(pair, family, ids):
    target, base = pair(family)
    adapters = adapters_for(target)
    before = logits(target, ids)
    for given in (None, adapters):
        expected = logits(rebuilt(target, base, adapters=given), ids)
        with hybrid(target, base, given):
            assert_same_bits(logits(target, ids), expected)
        assert not torch.equal(expected, before)
    assert_same_bits(logits(target, ids), before)
    assert not any("forward" in vars(module) for module in target.modules())


def test_some_layers_only(pair, family, ids):
    target, base = pair(family)
    adapters = adapters_for(target)
    for layers in ([], [0, 1], [2]):
        expected = logits(rebuilt(target, base, layers, adapters), ids)
        with hybrid(target, base, adapters, layers=layers):
            assert_same_bits(logits(target, ids), expected)


def test_generates_with_a_cache_as_without(pair, family, ids):
    target, base = pair(family)
    adapters = adapters_for(target)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    start = ids[:, :5]
    expected = rebuilt(target, base, adapters=adapters).generate(start, use_cache=False, **options)
    with hybrid(target, base, adapters):
        cached = target.generate(start, use_cache=True, **options)
    assert torch.equal(cached, expected)
    assert cached.shape[1] == 11


def test_gradients_reach_the_adapters(pair, family, ids):
    target, base = pair(family)
    adapters, by_hand = adapters_for(target), adapters_for(target)
    with hybrid(target, base, adapters):
        target(input_ids=ids).logits.square().sum().backward()
    rebuilt(target, base, adapters=by_hand)(input_ids=ids).logits.square().sum().backward()
    for ours, theirs in zip(adapters, by_hand, strict=True):
        for name, parameter in ours.named_parameters():
            assert_same_bits(parameter.grad, theirs.get_parameter(name).grad, name=name)


def test_factors_reach_the_hybrid(pair, ids):
    target, base = pair("gemma2")
    adapters = adapters_for(target)
    nothing = adapters.only([])
    with hybrid(target, base, nothing):
        off = logits(target, ids)
    for adapter in adapters:
        adapter.W_dec.data.zero_()
    with hybrid(target, base, adapters):
        assert_same_bits(logits(target, ids), off)


def test_steered_adds_beside_the_models_own_mlps(pair, family, ids):
    target, _ = pair(family)
    adapters = adapters_for(target).scaled(-0.5)
    expected = logits(rebuilt(target, target, adapters=adapters), ids)
    with steered(target, adapters):
        assert_same_bits(logits(target, ids), expected)


def test_a_base_of_another_precision(tiny_model, ids):
    """Values go to the base's dtype and back; the adapters have a dtype of their own, too."""
    target, base = tiny_model("llama", dtype=torch.bfloat16), tiny_model("llama", seed=1)
    with hybrid(target, base, adapters_for(target, torch.float32)):
        assert logits(target, ids).dtype == torch.bfloat16


def test_pairs_that_do_not_fit(tiny_model, ids):
    target = tiny_model("llama")
    base = tiny_model("llama", seed=1)
    for other, message in (
        (target, "base: expected another model than the target, got the same object twice"),
        (tiny_model("mistral"), "base: expected family 'llama' .the target's., got 'mistral'"),
        (tiny_model("llama", num_hidden_layers=2), "base: expected n_layers 3 .the target's., got 2"),
        (tiny_model("llama", vocab_size=62), "base: expected vocab_size 61 .the target's., got 62"),
        (
            tiny_model("llama", intermediate_size=40),
            "base: layer 0: expected an MLP of .*48, 32.*, got .*40, 32",
        ),
    ):
        with pytest.raises(ValueError, match=message), hybrid(target, other):
            pass
    adapters = adapters_for(target)
    partial = AdapterSet([adapters[0]], adapters.sites[:1])
    with (
        pytest.raises(ValueError, match=r"layers: expected layers of the transcoder set .*got \[1, 2\]"),
        hybrid(target, base, partial),
    ):
        pass
    with hybrid(target, base, partial, layers=[0]):
        logits(target, ids)
    with (
        pytest.raises(TypeError, match=r"got an AdapterSet; see fasttc\.models\.hybrid"),
        replaced(target, adapters),
    ):
        pass
    with (
        pytest.raises(TypeError, match="adapters: expected an AdapterSet, got list"),
        hybrid(target, base, []),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"layers: expected layers of the model \(0 to 2\), got 7"),
        hybrid(target, base, layers=[7]),
    ):
        pass


def test_tokenizers_are_compared(tiny_tokenizer):
    check_same_tokenizer(tiny_tokenizer, None)
    check_same_tokenizer(tiny_tokenizer, copy.deepcopy(tiny_tokenizer))
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["new"])
    with pytest.raises(
        ValueError, match=r"base: expected the target's tokenizer, got one that differs in 1 tokens"
    ):
        check_same_tokenizer(tiny_tokenizer, other)
