"""overridden(), replaced(), ablated(): what they change, and that they change it back."""

import pytest
import torch

from fasttc.models import (
    ablated,
    anatomy,
    capture,
    default_sites,
    float64_exact,
    overridden,
    replaced,
)
from fasttc.nn import Site


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def is_untouched(model):
    return not any(
        "forward" in vars(m) or len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    )


def every_site(family):
    for x in ("mlp_in", "normalized", "resid_mid"):
        for y in ("mlp_out", "mlp_out_post"):
            yield [Site(layer, x, y) for layer in range(3)]


def test_the_identity_changes_nothing(tiny_model, family, ids):
    model = tiny_model(family)
    before = logits(model, ids)
    for sites in every_site(family):
        with overridden(model, sites, [lambda x, y: y] * 3):
            assert torch.equal(logits(model, ids), before)
    assert is_untouched(model)


def test_functions_see_what_capture_sees_and_write_what_they_return(tiny_model, family, ids):
    model = tiny_model(family)
    for sites in every_site(family):
        with capture(model, sites) as expected:
            model(ids)
        calls = []

        def double(x, y, calls=calls):
            calls.append((x.detach(), y.detach()))
            return 2 * y

        with overridden(model, sites, [double] * 3), capture(model, sites) as record:
            model(ids)
        assert torch.equal(calls[0][0], expected.x[0])  # later layers see changed inputs
        assert torch.equal(calls[0][1], expected.y[0])
        assert torch.equal(record.y[0], 2 * expected.y[0])
        assert all(torch.equal(calls[i][0], record.x[i]) for i in range(3))


def test_replaced_equals_transcoders_put_in_by_hand(tiny_model, family, ids, transcoders):
    """An independent way: a hook on the layer's output swaps the contribution afterwards."""
    extra = {"use_parallel_residual": False} if family == "gpt_neox" else {}
    model = tiny_model(family, **extra)
    parts = anatomy(model)
    for sites in (default_sites(model), [Site(i, "resid_mid", "mlp_out_post") for i in range(3)]):
        tcs = transcoders(model, sites)
        handles = []
        for layer, (place, site) in enumerate(zip(parts.layers, sites, strict=True)):
            norm = model.get_submodule(place.mlp_norm)
            seen = {}
            handles.append(
                norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.update(resid=args[0]))
            )

            def swap(module, args, out, transcoder=tcs[layer], site=site, norm=norm, seen=seen):
                resid = seen["resid"]
                centred = resid - resid.mean(-1, keepdim=True) if parts.norm == "layer" else resid
                free = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + parts.norm_eps)
                x = {"resid_mid": resid, "normalized": free}.get(site.x)
                x = norm(resid) if x is None else x
                new = resid + transcoder(x)
                return (new, *out[1:]) if isinstance(out, tuple) else new

            handles.append(model.get_submodule(place.block).register_forward_hook(swap))
        by_hand = logits(model, ids)
        for handle in handles:
            handle.remove()
        plain = logits(model, ids)
        with replaced(model, tcs) as inside:
            assert inside is model
            after = logits(model, ids)
        torch.testing.assert_close(after, by_hand, rtol=1e-4, atol=1e-4)
        assert (after - plain).abs().max() > 0.1
        assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_terms_give_the_logits_of_the_original(tiny_model, family, ids, transcoders, dtype):
    model = tiny_model(family, dtype=dtype)
    before = logits(model, ids)
    for options in ({}, {"activation": "jumprelu", "skip": True}):
        with replaced(model, transcoders(model, **options), error_terms=True):
            assert torch.equal(logits(model, ids), before)


def test_error_terms_send_gradients_through_the_transcoders(tiny_model, ids, transcoders):
    model = tiny_model("gemma2").requires_grad_(False)
    tcs = transcoders(model)
    with replaced(model, tcs, error_terms=True):
        model(ids).logits.pow(2).sum().backward()
    assert all(tcs[i].W_dec.grad.abs().sum() > 0 for i in range(3))
    # The MLP's own derivative is cut: a transcoder that writes a constant leaves none.
    constant = transcoders(model)
    for transcoder in constant:
        torch.nn.init.zeros_(transcoder.W_dec)
    embedding = model.get_input_embeddings()(ids).requires_grad_()
    with (
        replaced(model, constant, error_terms=True, layers=[0]),
        capture(model, [Site(0, "mlp_in", "mlp_out_post")], detach=False) as record,
    ):
        model(inputs_embeds=embedding)
    (gradient,) = torch.autograd.grad(record.y[0].sum(), embedding, allow_unused=True)
    assert gradient is None or gradient.abs().max() == 0


def test_true_mlps_are_not_run(tiny_model, family, ids, transcoders):
    model = tiny_model(family)
    parts = anatomy(model)
    ran = []
    for place in parts.layers:
        for child in model.get_submodule(place.mlp).children():
            child.register_forward_hook(lambda *args: ran.append(1))
    with replaced(model, transcoders(model)):
        out = logits(model, ids)
    assert not ran
    assert out.isfinite().all()
    with ablated(model):
        model(ids)
    assert not ran
    with replaced(model, transcoders(model), layers=[1]):
        model(ids)
    assert ran


def test_some_layers(tiny_model, family, ids, transcoders):
    model = tiny_model(family)
    tcs = transcoders(model)
    sites = default_sites(model)
    with capture(model, sites) as plain:
        model(ids)
    with replaced(model, tcs, layers=[1]), capture(model, sites) as record:
        model(ids)
    assert torch.equal(record.y[0], plain.y[0])
    torch.testing.assert_close(record.y[1], tcs[1](plain.x[1]), rtol=1e-5, atol=1e-6)
    with replaced(model, tcs, layers=[2, 0]), ablated(model, [1]), capture(model, sites) as record:
        model(ids)
    torch.testing.assert_close(record.y[0], tcs[0](plain.x[0]), rtol=1e-5, atol=1e-6)
    assert record.y[1].abs().max() == 0
    with (
        pytest.raises(ValueError, match=r"name the layers to use only some"),
        replaced(model, transcoders(model, sites[:2])),
    ):
        pass


def test_ablated(tiny_model, family, ids):
    model = tiny_model(family)
    parts = anatomy(model)
    seen = {}
    for layer, place in enumerate(parts.layers):
        model.get_submodule(place.block).register_forward_hook(
            lambda module, args, out, layer=layer: seen.update(
                {layer: out[0] if isinstance(out, tuple) else out}
            )
        )
    resid = [Site(layer, "resid_mid", "mlp_out_post") for layer in range(3)]
    with ablated(model), capture(model, resid) as record:
        out = logits(model, ids)
    assert all(y.abs().max() == 0 for y in record.y)
    if not parts.parallel:
        assert all(torch.equal(seen[layer], record.x[layer]) for layer in range(3))
    assert (out - logits(model, ids)).abs().max() > 0.1
    with ablated(model, layers=[2]), capture(model, resid) as record:
        model(ids)
    assert [bool(y.abs().max() == 0) for y in record.y] == [False, False, True]


def test_generate_with_a_cache(tiny_model, family, transcoders, ids):
    model = tiny_model(family)
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids, **options)
    with replaced(model, transcoders(model)):
        cached = model.generate(ids, use_cache=True, **options)
        uncached = model.generate(ids, use_cache=False, **options)
        inside = logits(model, cached[:, :-1])
    assert torch.equal(cached, uncached)
    assert torch.equal(inside.argmax(-1)[:, ids.shape[1] - 1 :], cached[:, ids.shape[1] :])
    assert (inside - logits(model, cached[:, :-1])).abs().max() > 0.1
    with replaced(model, transcoders(model), error_terms=True):
        assert torch.equal(model.generate(ids, **options), plain)


def test_restored_after_exceptions(tiny_model, family, ids, transcoders):
    model = tiny_model(family)
    before = logits(model, ids)
    tcs = transcoders(model)
    with pytest.raises(IndexError), replaced(model, tcs):
        model(ids + 100)
    assert is_untouched(model)

    def broken(x, y):
        raise ArithmeticError("in a function")

    for needs_output in (True, False):
        context = overridden(model, tcs.sites, [broken] * 3, needs_output=needs_output)
        with pytest.raises(ArithmeticError, match="in a function"), context:
            model(ids)
        assert is_untouched(model)
    assert torch.equal(logits(model, ids), before)


def test_the_same_layer_twice_is_refused(tiny_model, ids, transcoders):
    model = tiny_model("gemma2")
    tcs = transcoders(model)
    before = logits(model, ids)
    with replaced(model, tcs):
        inside = logits(model, ids)
        again = ablated(model, layers=[1])
        with pytest.raises(ValueError, match="layer 1: expected an MLP that is not overridden yet"), again:
            pass
        assert torch.equal(logits(model, ids), inside)
    twice = [Site(0), Site(2), Site(2)]
    with (
        pytest.raises(ValueError, match="layer 2: expected an MLP"),
        overridden(model, twice, [lambda x, y: y] * 3),
    ):
        pass
    assert torch.equal(logits(model, ids), before)
    assert is_untouched(model)


def test_errors(tiny_model, ids, transcoders):
    model = tiny_model("gpt2")
    too_few = overridden(model, [Site(0), Site(1)], [lambda x, y: y])
    with pytest.raises(ValueError, match=r"functions: expected one per site \(2\), got 1"), too_few:
        pass
    narrow = overridden(model, [Site(0)], [lambda x, y: y[..., :5]])
    with pytest.raises(ValueError, match=r"layer 0: expected shape \[2, 9, 32\], got \[2, 9, 5\]"), narrow:
        model(ids)
    beyond = ablated(model, layers=[7])
    with pytest.raises(ValueError, match=r"expected a layer of the model \(0 to 2\), got layer 7"), beyond:
        pass


def test_inside_peft(tiny_model, ids, transcoders):
    peft = pytest.importorskip("peft")
    plain = tiny_model("gemma3")
    tcs = transcoders(plain)
    with replaced(plain, tcs):
        expected = logits(plain, ids)
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(plain, config).eval()
    before = logits(model, ids)
    with replaced(model, tcs):
        assert torch.equal(logits(model, ids), expected)  # only MLPs were adapted, and they are gone
    with replaced(model, tcs, error_terms=True):
        assert torch.equal(logits(model, ids), before)
        with model.disable_adapter():
            assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)


def test_called_by_keyword(tiny_model, transcoders):
    model = tiny_model("qwen2")
    tcs = transcoders(model)
    x = torch.randn(1, 4, 32)
    with replaced(model, tcs):
        assert torch.equal(model.model.layers[0].mlp(x=x), tcs[0](x))


def test_other_dtypes_and_precision(tiny_model, ids, transcoders):
    """Transcoders keep their own dtype, also inside a model that computes in exact float64."""
    model = tiny_model("gemma2").bfloat16()
    tcs = transcoders(tiny_model("gemma2"))
    with replaced(model, tcs):
        assert logits(model, ids).dtype == torch.bfloat16
    model = tiny_model("gemma2").double()
    narrow, wide = (
        transcoders(tiny_model("gemma2")),
        transcoders(tiny_model("gemma2")).to(dtype=torch.float64),
    )
    seen = []

    def spy(x, y):
        seen.append(torch.ones(1).float().dtype)
        return y

    with float64_exact(model):
        with replaced(model, narrow):
            a = logits(model, ids)
        with replaced(model, wide):
            b = logits(model, ids)
        with overridden(model, [Site(0)], [spy]):
            model(ids)
        with replaced(model, wide, error_terms=True):
            assert torch.equal(logits(model, ids), logits(model, ids))
    assert 1e-12 < (a - b).abs().max() < 1e-3
    assert seen == [torch.float32]


def test_gradient_checkpointing(tiny_model, ids, transcoders):
    model = tiny_model("llama")
    tcs = transcoders(model)

    def gradient():
        model.zero_grad()
        with replaced(model, tcs):
            model(ids).logits.pow(2).sum().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    plain = gradient()
    model.train()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain)


def test_stories(shared_data, transcoders):
    """The same on a real model."""
    from fasttc.models import load
    from fasttc.nn import Transcoder, TranscoderSet

    model, tokenizer = load(shared_data / "models" / "stories260K")
    ids = tokenizer("Once upon a time there was a girl", return_tensors="pt")["input_ids"]
    sites = default_sites(model)
    width = anatomy(model).d_model
    tcs = TranscoderSet([Transcoder(width, 4 * width, k=8).eval() for _ in sites], sites)
    before = logits(model, ids)
    with replaced(model, tcs, error_terms=True):
        assert torch.equal(logits(model, ids), before)
    with replaced(model, tcs):
        assert (logits(model, ids) - before).abs().max() > 0.1
    with capture(model, sites) as record:
        model(ids)
    assert record.y[-1].shape == (*ids.shape, width)
    assert torch.equal(logits(model, ids), before)
