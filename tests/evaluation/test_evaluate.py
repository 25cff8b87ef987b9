"""evaluate: what must not change its numbers, what it must leave alone, what it must refuse."""

import pytest
import torch

import fasttc
from fasttc.evaluation import evaluator, metrics
from fasttc.models import capture
from fasttc.nn import Site, Transcoder, TranscoderSet
from fasttc.training.data import TokenData

BOS, F, K = 2, 24, 5
WHOLE = {"fractions": (0.0, 0.0, 1.0), "context": 24, "tokens": None}


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama", dtype=torch.float64)


def numbers(report) -> dict:
    return {name: value for name, value in report.to_dict().items() if name != "settings"}


def assert_near(got, wanted, rel=1e-6) -> None:
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for name in wanted:
            assert_near(got[name], wanted[name], rel)
    elif isinstance(wanted, list):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert_near(a, b, rel)
    elif isinstance(wanted, int | float):
        assert got == pytest.approx(wanted, rel=rel)
    else:
        assert got == wanted


@pytest.mark.parametrize(("batch_size", "context"), [(1, 24), (7, 24), (2, 63)])
def test_packing_and_padding_change_nothing(llama, batch_size, context, transcoders, documents):
    tcs, docs = transcoders(llama), documents
    wanted = fasttc.evaluate(llama, tcs, docs, **WHOLE)
    got = fasttc.evaluate(llama, tcs, docs, batch_size=batch_size, **{**WHOLE, "context": context})
    assert_near(numbers(got), numbers(wanted))


def test_bitwise_equal_from_run_to_run(llama, transcoders, documents):
    tcs, docs = transcoders(llama), documents
    assert fasttc.evaluate(llama, tcs, docs, **WHOLE) == fasttc.evaluate(llama, tcs, docs, **WHOLE)


def test_logits_are_never_held_for_more_than_a_chunk(llama, monkeypatch, transcoders, documents):
    tcs, docs = transcoders(llama), documents
    wanted, seen = fasttc.evaluate(llama, tcs, docs, **WHOLE), []
    monkeypatch.setattr(metrics, "LOGITS_AT_ONCE", 5 * 61 + 3)
    handle = llama.lm_head.register_forward_hook(
        lambda module, args, out: seen.append(out.shape[:-1].numel())
    )
    got = fasttc.evaluate(llama, tcs, docs, **WHOLE)
    handle.remove()
    assert max(seen) == 5
    assert sum(seen) == 10 * wanted.predictions  # 9 variants, and the original once more beside the replaced
    assert_near(numbers(got), numbers(wanted), rel=1e-12)


def test_a_perfect_transcoder_costs_nothing(tiny_model, transcoders, documents):
    """Skip transcoders that are the MLP: a model whose MLPs are linear."""
    model = tiny_model("gpt2", dtype=torch.float64, activation_function="linear")
    tcs = transcoders(model)
    with torch.no_grad():
        for tc, block in zip(tcs, model.transformer.h, strict=True):
            mlp = block.mlp
            tc.W_dec.zero_()
            tc.W_skip.copy_((mlp.c_fc.weight @ mlp.c_proj.weight).T)
            tc.b_dec.copy_(mlp.c_fc.bias @ mlp.c_proj.weight + mlp.c_proj.bias)
    report = fasttc.evaluate(model, tcs, documents, **WHOLE)
    assert report.fvu < 1e-12
    assert report.kl < 1e-6
    assert report.top1_error == 0
    assert report.recovered == pytest.approx(1, abs=1e-5)


def test_a_transcoder_that_says_nothing_is_an_ablation(llama, transcoders, documents):
    tcs = transcoders(llama)
    with torch.no_grad():
        for tc in tcs:
            for parameter in (tc.W_dec, tc.b_dec, tc.W_skip):
                parameter.zero_()
    report = fasttc.evaluate(llama, tcs, documents, **WHOLE)
    assert report.ce_replaced == report.ce_ablated
    assert report.recovered == 0
    assert [layer.recovered for layer in report.layers] == [0, 0, 0]


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
def test_other_activations(llama, activation, transcoders, documents):
    tcs = transcoders(llama, activation)
    for tc in tcs:
        if tc.threshold is not None:
            tc.threshold.data.fill_(0.2)
    report = fasttc.evaluate(llama, tcs, documents, **WHOLE)
    with capture(llama, tcs.sites) as record, torch.no_grad():
        fired = []
        for doc in documents:
            llama(torch.tensor([[BOS, *doc]]))
            fired.append(
                (tcs[1].pre_activations(record.x[1][0, 1:]) > (0.0 if activation == "relu" else 0.2)).double()
            )
    assert report.layers[1].l0 == pytest.approx(float(torch.cat(fired).sum(1).mean()), rel=1e-9)


def test_some_layers_only(llama, transcoders, documents):
    tcs, docs = transcoders(llama), documents
    one = TranscoderSet([tcs[1]], [tcs.sites[1]])
    whole, part = fasttc.evaluate(llama, tcs, docs, **WHOLE), fasttc.evaluate(llama, one, docs, **WHOLE)
    assert_near(numbers(part)["layers"][0], numbers(whole)["layers"][1], rel=1e-12)
    assert part.ce_replaced == part.layers[0].ce_replaced
    assert part.ce_ablated == part.layers[0].ce_ablated


def test_low_precision_models_are_measured_in_float32_or_better(tiny_model, llama, transcoders, documents):
    docs = documents
    wanted = fasttc.evaluate(llama, transcoders(llama), docs, **WHOLE)
    model = tiny_model("llama", dtype=torch.bfloat16)
    tcs = transcoders(llama)
    for tc in tcs:
        tc.to(torch.bfloat16)
    got = fasttc.evaluate(model, tcs, docs, **WHOLE)
    # eps of bfloat16 is 2^-7; the numbers are means over a hundred positions.
    assert got.ce_original == pytest.approx(wanted.ce_original, rel=2**-5)
    assert got.fvu == pytest.approx(wanted.fvu, rel=2**-5)


def test_token_limit_and_options(llama, transcoders, documents):
    tcs = transcoders(llama)
    data = TokenData(
        [[5 + i, *doc] for i in range(4) for doc in documents],
        context=24,
        bos_id=BOS,
        fractions=(0.5, 0.25, 0.25),
    )
    test = fasttc.evaluate(llama, tcs, data, tokens=40, batch_size=1, per_layer=False)
    assert 0 < test.tokens < 70
    assert test.settings["split"] == "test"
    assert {layer.ce_replaced for layer in test.layers} == {None}
    everything = fasttc.evaluate(llama, tcs, data, tokens=None, split="validation", per_layer=False)
    wanted = sum(len(data.documents[i]) for i in data.splits["validation"])
    assert everything.tokens == wanted
    loose = fasttc.evaluate(llama, tcs, data, tokens=None, per_layer=False, dense_above=0.001)
    assert all(layer.dense == layer.n_features - layer.dead for layer in loose.layers)


# --- the model afterwards --------------------------------------------------------------------------------------


def test_everything_is_left_as_it_was(llama, transcoders, documents):
    tcs = transcoders(llama, "batchtopk")
    llama.train()
    for tc in tcs:
        tc.train()
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    thresholds = [tc.threshold.clone() for tc in tcs]
    fasttc.evaluate(llama, tcs, documents, **WHOLE)
    assert llama.training
    assert all(tc.training for tc in tcs)
    assert all(torch.equal(a, tc.threshold) for a, tc in zip(thresholds, tcs, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
    assert "forward" not in vars(llama.model.layers[0].mlp)


def test_an_exception_restores_the_model_too(llama, monkeypatch, transcoders, documents):
    tcs = transcoders(llama)
    llama.train()
    monkeypatch.setattr(evaluator.Prediction, "add", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fasttc.evaluate(llama, tcs, documents, **WHOLE)
    assert llama.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
    assert "forward" not in vars(llama.model.layers[0].mlp)


def test_inside_peft(llama, transcoders, documents):
    peft = pytest.importorskip("peft")
    tcs, docs = transcoders(llama), documents
    wanted = fasttc.evaluate(llama, tcs, docs, **WHOLE)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    got = fasttc.evaluate(peft.get_peft_model(llama, config), tcs, docs, **WHOLE)
    assert_near(numbers(got), numbers(wanted), rel=1e-12)


# --- a base ----------------------------------------------------------------------------------------------------


def test_drift_against_a_base(llama, transcoders, documents):
    base, tcs = transcoders(llama), transcoders(llama)
    turn = torch.linspace(0, 3.0, F, dtype=torch.float64)
    with torch.no_grad():
        row = tcs[1].W_enc
        other = torch.randn_like(row)
        other -= (other * row).sum(1, keepdim=True) / row.square().sum(1, keepdim=True) * row
        other *= row.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True)
        row.copy_(5 * (turn.cos()[:, None] * row + turn.sin()[:, None] * other))
        tcs[2].W_dec[3] = 0
    report = fasttc.evaluate(llama, tcs, documents, base=base, per_layer=False, **WHOLE)
    torch.testing.assert_close(report.features[1].encoder_cosine, turn.cos(), rtol=1e-9, atol=1e-9)
    assert report.layers[1].encoder_cosine == pytest.approx(float(turn.cos().mean()), rel=1e-9)
    assert report.layers[1].lowest_encoder_cosine == pytest.approx(float(turn.cos().min()), rel=1e-9)
    assert report.layers[0].encoder_cosine == pytest.approx(1, abs=1e-12)
    assert report.layers[2].lowest_decoder_cosine == 0
    assert report.layers[2].decoder_cosine == pytest.approx((F - 1) / F, rel=1e-9)
    assert "cos enc" in str(report)


def test_cosines_of_zero_rows_and_chunks():
    a = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    b = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 2.0], [3.0, 0.0]])
    for rows_at_once in (1, 3, 4):
        cosines = metrics.row_cosines(a, b, rows_at_once)
        torch.testing.assert_close(cosines, torch.tensor([1.0, 0.0, 1.0, -1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected matrices of one shape, got \[4, 2\] and \[3, 2\]"):
        metrics.row_cosines(a, b[:3])


# --- bad input -------------------------------------------------------------------------------------------------


def test_an_fvu_above_one_comes_with_a_hint(llama, transcoders, documents):
    tcs = transcoders(llama)
    with torch.no_grad():
        tcs[2].b_dec.fill_(30.0)
    report = fasttc.evaluate(llama, tcs, documents, per_layer=False, **WHOLE)
    assert report.layers[2].fvu > 1
    hints = [hint for hint in report.hints if hint.startswith("layer 2: FVU")]
    assert len(hints) == 1
    assert "do not read mlp_in and write mlp_out" in hints[0]
    assert f"hint: {hints[0]}" in str(report)


def test_bad_input_is_named(llama, transcoders, documents):
    tcs, docs = transcoders(llama), documents

    def run(tcs=tcs, docs=docs, **options):
        return fasttc.evaluate(llama, tcs, docs, **{**WHOLE, **options})

    wide = TranscoderSet([Transcoder(16, F, k=K)] * 3, tcs.sites)
    deep = TranscoderSet([tcs[0]], [Site(7)])
    narrow = TranscoderSet([Transcoder(32, F - 1, k=K)] * 3, tcs.sites)
    part = TranscoderSet([tcs[0]], [tcs.sites[0]])
    for call, match in (
        (lambda: run(tcs=wide), "expected .*32.* got .*16"),
        (lambda: run(tcs=deep), r"7"),
        (lambda: run(base=narrow), r"base: layer 0: expected W_enc \[24, 32\], got \[23, 32\]"),
        (lambda: run(base=part), r"base: expected transcoders of layers \[0, 1, 2\], got \[0\]"),
        (lambda: run(docs=[[5]]), "expected documents of at least three tokens, got none"),
        (lambda: run(tokens=0), "tokens: expected an int >= 1 or None, got 0"),
        (lambda: run(dense_above=1.5), "dense_above: expected a share between 0 and 1, got 1.5"),
        (lambda: run(split="all"), "split: expected one of train, validation, test, got 'all'"),
        (lambda: run(context=100), "context: expected at most the model's 64 positions, got 100"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
