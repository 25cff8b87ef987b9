"""capture(): the right tensors, at every kind of site, on every family."""

from itertools import product

import pytest
import torch

from fasttc.models import anatomy, capture, default_sites, float64_exact
from fasttc.nn import Site


def by_hand(model, ids):
    """What the forward of each layer passes around, collected with hooks of the test's own."""
    parts = anatomy(model)
    seen = {}
    handles = []
    for layer, place in enumerate(parts.layers):
        for role in ("mlp_norm", "mlp", "mlp_post_norm"):
            path = getattr(place, role)
            if path is not None:
                handles.append(
                    model.get_submodule(path).register_forward_hook(
                        lambda module, args, out, key=(layer, role): seen.update(
                            {(*key, "in"): args[0].detach(), (*key, "out"): out.detach()}
                        )
                    )
                )
    model(ids)
    for handle in handles:
        handle.remove()
    return parts, seen


def test_equals_hooks_by_hand(tiny_model, family, ids):
    model = tiny_model(family)
    parts, seen = by_hand(model, ids)
    before = model(ids).logits
    for x, y in product(("mlp_in", "normalized", "resid_mid"), ("mlp_out", "mlp_out_post")):
        with capture(model, [Site(layer, x, y) for layer in range(3)]) as record:
            assert record.x == [None] * 3
            assert torch.equal(model(ids).logits, before)
        for layer in range(3):
            check_input(model, parts, seen, layer, x, record.x[layer])
            writer = "mlp_post_norm" if y == "mlp_out_post" and family.startswith("gemma") else "mlp"
            assert torch.equal(record.y[layer], seen[layer, writer, "out"])
            assert record.x[layer].shape == record.y[layer].shape == (2, 9, 32)
            assert not record.x[layer].requires_grad
            assert not record.y[layer].requires_grad


def check_input(model, parts, seen, layer, kind, value):
    resid, mlp_in = seen[layer, "mlp_norm", "in"], seen[layer, "mlp", "in"]
    if kind != "normalized":
        assert torch.equal(value, resid if kind == "resid_mid" else mlp_in)
        return
    centred = resid - resid.mean(-1, keepdim=True) if parts.norm == "layer" else resid
    expected = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + parts.norm_eps)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=2e-6)
    norm = model.get_submodule(parts.layers[layer].mlp_norm)
    gained = value * (norm.weight + parts.gain_offset) + getattr(norm, "bias", 0.0)
    torch.testing.assert_close(gained, mlp_in, rtol=1e-5, atol=2e-6)


def test_contributions_add_up_to_the_residual(tiny_model, family, ids):
    """resid_mid + (MLP after its post-norm) is the next layer's input, except in a parallel block."""
    model = tiny_model(family, **({"use_parallel_residual": False} if family == "gpt_neox" else {}))
    seen = []
    block = model.get_submodule(anatomy(model).layers[1].block)
    handle = block.register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with capture(model, [Site(1, "resid_mid", "mlp_out_post")]) as record:
        model(ids)
    handle.remove()
    torch.testing.assert_close(record.x[0] + record.y[0], seen[0])


def test_subset_and_order_of_sites(tiny_model, ids):
    model = tiny_model("qwen3")
    with capture(model, default_sites(model)) as full:
        model(ids)
    with capture(model, [Site(2), Site(0)]) as some:
        model(ids)
    assert torch.equal(some.x[0], full.x[2])
    assert torch.equal(some.y[1], full.y[0])
    assert [site.write for site in some.sites] == ["model.layers.2.mlp", "model.layers.0.mlp"]


def test_trunk_alone_and_repeated_forwards(tiny_model, family, ids):
    model = tiny_model(family)
    trunk = model.get_submodule(anatomy(model).trunk)
    with capture(model, default_sites(model)) as record:
        model(ids)
        first = record.y[1]
        trunk(ids[:, :4])
        assert record.y[1].shape == (2, 4, 32)
        torch.testing.assert_close(record.y[1], first[:, :4])
    trunk(ids)
    assert record.y[1].shape == (2, 4, 32)  # hooks are gone


def test_gradients_when_asked(tiny_model, ids):
    model = tiny_model("gemma3")
    sites = [Site(0), Site(1, "normalized"), Site(2)]
    with capture(model, sites, detach=False) as record:
        model(ids)
    for later in (record.x[1], record.y[2]):
        (gradient,) = torch.autograd.grad(later.pow(3).sum(), record.x[0], retain_graph=True)
        assert gradient.abs().sum() > 0


def test_stream_layer_by_layer(tiny_model, family, ids):
    model = tiny_model(family)
    sites = default_sites(model)
    with capture(model, sites) as kept:
        model(ids)
    events = []

    def on_layer(index, x, y):
        assert record.x == record.y == [None] * 3
        events.append((index, x, y))

    with capture(model, sites, on_layer=on_layer) as record:
        model(ids)
    assert [index for index, _, _ in events] == [0, 1, 2]
    for index, x, y in events:
        assert torch.equal(x, kept.x[index])
        assert torch.equal(y, kept.y[index])


def test_hooks_are_removed_after_exceptions(tiny_model, ids):
    model = tiny_model("gpt_neox")

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    with capture(model, default_sites(model)):
        assert hooks() > before
    with pytest.raises(IndexError), capture(model, default_sites(model)):
        model(ids + 100)
    assert hooks() == before
    wrong = [Site(0), Site(9)]
    with pytest.raises(ValueError, match=r"of the model \(0 to 2\), got layer 9"), capture(model, wrong):
        pass
    assert hooks() == before


def test_a_failed_forward_leaves_nothing_of_the_one_before(tiny_model, ids):
    model = tiny_model("llama")
    with capture(model, default_sites(model)) as record:
        model(ids)
        with pytest.raises(IndexError):
            model(ids + 100)
        assert record.x == record.y == [None] * 3


def test_inside_peft(tiny_model, ids):
    peft = pytest.importorskip("peft")
    plain = tiny_model("mistral")
    with capture(plain, default_sites(plain)) as expected:
        plain(ids)
    config = peft.LoraConfig(r=2, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(plain, config).eval()
    with capture(model, default_sites(model)) as record:
        model(ids)
        adapted = list(record.y)
        with model.disable_adapter():
            model(ids)
    assert record.sites[0].read.startswith("base_model.model.")
    for layer in range(3):
        assert torch.equal(record.y[layer], expected.y[layer])
        assert not torch.equal(adapted[layer], expected.y[layer])


def test_precision_of_the_normalised_residual(tiny_model, ids):
    """float64 models normalise in float32, as transformers does, unless float64_exact is on; bfloat16 rounds once."""
    site = [Site(1, "normalized")]
    model = tiny_model("llama").double()

    def error(resid, value):
        exact = resid.double() * torch.rsqrt(resid.double().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (value - exact).abs().max().item()

    for context, low, high in ((None, 1e-9, 1e-6), (float64_exact(model), 0.0, 1e-14)):
        with capture(model, site) as record, capture(model, [Site(1, "resid_mid")]) as resid:
            if context is None:
                model(ids)
            else:
                with context:
                    model(ids)
        assert low <= error(resid.x[0], record.x[0]) <= high
    half = tiny_model("llama").bfloat16()
    with capture(half, site) as record, capture(half, [Site(1, "resid_mid")]) as resid:
        half(ids)
    assert record.x[0].dtype == torch.bfloat16
    assert error(resid.x[0], record.x[0]) < 4 * 2**-8


def test_keyword_only_calls(tiny_model):
    model = tiny_model("llama")
    resid = torch.randn(1, 3, 32)
    layer = model.model.layers[0]
    with capture(model, [Site(0, "normalized")]) as gain_free, capture(model, [Site(0)]) as record:
        out = layer.mlp(x=layer.post_attention_layernorm(hidden_states=resid))
    assert torch.equal(record.y[0], out)
    torch.testing.assert_close(gain_free.x[0] * layer.post_attention_layernorm.weight, record.x[0])
