"""held(): a second pass on the original's patterns and scales; and that nothing is left behind."""

import pytest
import torch

from fasttc.models import anatomy, float64_exact, held, overridden
from fasttc.nn import Site


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def is_untouched(model):
    return not any(
        "forward" in vars(m) or len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    )


def test_without_changes_the_bits_are_the_same(tiny_model, family, ids):
    model = tiny_model(family)
    before = logits(model, ids)
    options = {"max_new_tokens": 6, "do_sample": False}
    text = model.generate(ids[:1], **options)
    with held(model, attention=True, norms=True, original=True) as state:
        assert torch.equal(logits(model, ids), before)
        assert (state.start, state.prompt, state.original) == (0, 9, False)
        assert torch.equal(model.generate(ids[:1], **options), text)
        assert (state.start, state.prompt) == (9 + 6 - 2, 9)  # the last token is never read
    assert model.config._attn_implementation == "eager"
    assert is_untouched(model)
    assert torch.equal(logits(model, ids), before)


def record(model, parts):
    """Patterns and residual norm inputs of the next forwards, by hooks."""
    seen = {}
    handles = []
    for layer in parts.layers:
        attention, norm = model.get_submodule(layer.attn), model.get_submodule(layer.attn_norm)
        handles.append(attention.register_forward_hook(lambda m, a, out: seen.update({m: out[1]})))
        handles.append(norm.register_forward_hook(lambda m, a, out: seen.update({m: (a[0], out)})))
    return seen, handles


@pytest.mark.parametrize("exact", [False, True], ids=["float32", "float64"])
def test_patterns_and_scales_are_the_originals(tiny_model, family, ids, exact):
    model = tiny_model(family, dtype=torch.float64 if exact else torch.float32)
    parts = anatomy(model)
    top = parts.layers[-1]
    attention, norm = model.get_submodule(top.attn), model.get_submodule(top.attn_norm)

    def push(x, y):
        return y if state.original else y + torch.linspace(-1, 1, y.shape[-1]).to(y)

    def keep(x, y):
        return y

    def scale(resid):
        resid = resid - resid.mean(-1, keepdim=True) if parts.norm == "layer" else resid
        return resid.square().mean(-1).sqrt()

    def run(change=push):
        seen, handles = record(model, parts)
        with overridden(model, [Site(0)], [change]):
            logits(model, ids)
        for handle in handles:
            handle.remove()
        return seen

    precision = float64_exact(model) if exact else torch.no_grad()
    with precision:
        with held(model, original=True) as state:
            live = run()
        plain = run(keep)
        assert not torch.allclose(live[attention], plain[attention], atol=1e-3)
        with held(model, attention=True) as state:
            frozen = run()
            assert torch.equal(frozen[attention], plain[attention])
        with held(model, norms=True) as state:
            frozen = run()
        change = frozen[norm][0] - plain[norm][0]
        if parts.norm == "layer":
            change = change - change.mean(-1, keepdim=True)
        expected = plain[norm][1] + change / scale(plain[norm][0])[..., None] * (
            norm.weight + parts.gain_offset
        )
        torch.testing.assert_close(frozen[norm][1], expected, rtol=1e-4, atol=1e-4)
        assert float((scale(frozen[norm][0]) / scale(plain[norm][0]) - 1).abs().max()) > 1e-3


def test_other_attention_implementations_come_back(tiny_model, ids):
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    before = logits(model, ids)
    with held(model, attention=True):
        torch.testing.assert_close(logits(model, ids), before, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(IndexError), held(model, attention=True, norms=True):
        model(ids + 100)
    assert model.config._attn_implementation == "sdpa"
    assert is_untouched(model)


def test_a_cache_from_outside_and_several_sequences_are_refused(tiny_model, ids):
    model = tiny_model("qwen2")
    begun = model(ids[:1], use_cache=True)
    with held(model, attention=True):
        with pytest.raises(
            ValueError, match=r"cache: expected one begun in this context \(0 tokens\), got 9"
        ):
            model(ids[:1, :1], past_key_values=begun.past_key_values)
        with pytest.raises(
            ValueError, match="batch: expected one sequence where a cache meets held values, got 2"
        ):
            model.generate(ids, max_new_tokens=3, do_sample=False)
    with held(model):  # nothing is held: positions only
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)
    context = held(model, attention=True)
    with (
        held(model, attention=True),
        pytest.raises(ValueError, match="patterns that are not held yet"),
        context,
    ):
        pass
    assert is_untouched(model)
