"""Prompts, models and sets as users have them: in other modes, wrapped, broken, or not matching."""

import pytest
import torch

import fasttc
from fasttc import TranscoderSet
from fasttc.models import float64_exact
from fasttc.models.linear import unembedding


def test_text_gets_a_special_token_in_front(tiny_model, random_set, tiny_tokenizer):
    model = tiny_model("llama")
    tcs = random_set(model)
    graph = fasttc.attribute(model, tcs, "t17 t9 t33", tokenizer=tiny_tokenizer)
    assert graph.input_ids.tolist() == [2, 17, 9, 33]
    assert graph.tokens == ["<bos>", " t17", " t9", " t33"]
    assert graph.prompt == "t17 t9 t33"
    given = fasttc.attribute(model, tcs, [17, 9, 33], tokenizer=tiny_tokenizer)
    assert given.input_ids.tolist() == [17, 9, 33]  # ids are used as given
    assert given.prompt == " t17 t9 t33"


class _NoSpecial:
    """A tokenizer that adds nothing by itself."""

    all_special_ids = (0, 1, 2)
    bos_token_id, pad_token_id, eos_token_id = None, 0, 1

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}

    def __len__(self):
        return 61

    def decode(self, ids):
        return "|".join(map(str, ids))

    def batch_decode(self, rows):
        return [self.decode(ids) for ids in rows]


def test_prepending_can_be_switched_off(tiny_model, random_set):
    model = tiny_model("llama")
    tcs = random_set(model)
    tokenizer = _NoSpecial()
    with_token = fasttc.attribute(model, tcs, "17 9", tokenizer=tokenizer)
    assert with_token.input_ids.tolist() == [0, 17, 9]  # no beginning token: the padding one
    without = fasttc.attribute(model, tcs, "17 9", tokenizer=tokenizer, prepend_bos=False)
    assert without.input_ids.tolist() == [17, 9]
    there = fasttc.attribute(model, tcs, "1 17 9", tokenizer=tokenizer)
    assert there.input_ids.tolist() == [1, 17, 9]


def test_one_token(tiny_model, random_set):
    model = tiny_model("gemma2")
    graph = fasttc.attribute(model, random_set(model), [2])
    assert (graph.n_features, graph.n_tokens, graph.n_errors) == (0, 1, 3)
    assert graph.columns.tolist() == [graph.token_slice.start] * graph.n_logits
    assert bool(torch.isfinite(graph.values).all())


def test_a_layer_without_active_features(tiny_model, random_set, oracle, prompt_ids):
    model = tiny_model("llama", dtype=torch.float64)
    tcs = random_set(model, "jumprelu")
    with torch.no_grad():
        tcs[1].threshold.fill_(1e6)
    with float64_exact(model):
        graph = fasttc.attribute(model, tcs, prompt_ids)
        expected = oracle(model, tcs, prompt_ids).adjacency(graph, unembedding(model).weight)
    assert set(graph.features[:, 0].tolist()) == {0, 2}
    assert (graph.dense() - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_no_active_feature_at_all(tiny_model, random_set, prompt_ids):
    model = tiny_model("llama")
    tcs = random_set(model, "jumprelu")
    with torch.no_grad():
        for transcoder in tcs:
            transcoder.threshold.fill_(1e6)
    graph = fasttc.attribute(model, tcs, prompt_ids)
    assert graph.n_features == 0
    assert graph.n_edges > 0


def test_the_model_is_left_as_it_was(tiny_model, random_set, prompt_ids):
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    tcs = random_set(model)
    expected = fasttc.attribute(model, tcs, prompt_ids)
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    model.set_attn_implementation("sdpa")
    graph = fasttc.attribute(model, tcs, prompt_ids)
    assert torch.equal(graph.values, expected.values)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adapted_weights_count(tiny_model, random_set, prompt_ids):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", dtype=torch.float64)
    config = peft.LoraConfig(r=2, target_modules=["v_proj", "o_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    tcs = random_set(wrapped)
    graph = fasttc.attribute(wrapped, tcs, prompt_ids)
    merged = wrapped.merge_and_unload()
    expected = fasttc.attribute(merged, tcs, prompt_ids)
    assert torch.equal(graph.features, expected.features)
    torch.testing.assert_close(graph.dense(), expected.dense(), rtol=0, atol=1e-6)


def test_short_weights_are_summed_in_float32(tiny_model, random_set, prompt_ids):
    model = tiny_model("gemma2")
    tcs = random_set(model)
    exact = fasttc.attribute(model, tcs, prompt_ids)
    short = fasttc.attribute(model, tcs, prompt_ids, weight_dtype=torch.bfloat16)
    assert short.values.dtype == torch.float32
    assert short.metadata["precision"]["attention_weights"] == "bfloat16"
    difference = (short.dense() - exact.dense()).norm() / exact.dense().norm()
    assert 0 < difference < 2**-8  # one rounding of the weights
    half = fasttc.attribute(model.bfloat16(), tcs, prompt_ids)
    assert half.metadata["precision"]["model"] == "bfloat16"


def test_graph_is_saved_with_its_provenance(tiny_model, random_set, prompt_ids, tmp_path):
    model = tiny_model("qwen2")
    graph = fasttc.attribute(model, random_set(model), prompt_ids, progress=True)
    graph.save(tmp_path / "graph.safetensors")
    loaded = fasttc.Graph.load(tmp_path / "graph.safetensors")
    assert loaded.metadata == graph.metadata
    assert loaded.metadata["precision"] == {
        "model": "float32",
        "transcoders": "float32",
        "attention_weights": "float32",
        "arithmetic": "float32",
        "device": "cpu",
    }


def test_mean_of_the_unembedding_follows_the_weights(tiny_model):
    model = tiny_model("llama")
    first = unembedding(model)
    assert unembedding(model).mean is first.mean  # no second pass over the vocabulary
    with torch.no_grad():
        model.lm_head.weight += 1
    torch.testing.assert_close(unembedding(model).mean, first.mean + 1)


def test_bad_prompts(tiny_model, random_set, tiny_tokenizer):
    model = tiny_model("llama")
    tcs = random_set(model)
    for prompt, message in (
        (list(range(4, 60)) * 2, r"prompt: expected at most 64 tokens \(the model's context\), got 112"),
        ([2, 61], r"input_ids: expected ids in \[0, 61\), got 2 to 61"),
        ([], r"prompt: expected text or token ids \[T\]"),
        ([0.5, 1.0], r"prompt: expected text or token ids \[T\], got torch.float32"),
        ([[2, 3], [4]], r"attribute_many takes several prompts"),
        (["t4", "t5"], r"attribute_many takes several prompts"),
        ("t4 t5", r"prompt: expected token ids, or a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            fasttc.attribute(model, tcs, prompt)


def test_nan_activations(tiny_model, random_set, prompt_ids):
    model = tiny_model("llama")
    tcs = random_set(model)
    with torch.no_grad():
        tcs[1].b_dec[3] = torch.nan
    with pytest.raises(ValueError, match="reconstruction errors of layer 1: expected finite numbers"):
        fasttc.attribute(model, tcs, prompt_ids)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="MLP output of layer 0: expected finite numbers, got NaN"):
        fasttc.attribute(model, tcs, prompt_ids)


def test_sets_that_do_not_match(tiny_model, random_set, prompt_ids):
    model = tiny_model("llama")
    tcs = random_set(model)
    fewer = TranscoderSet(list(tcs)[:2], tcs.sites[:2])
    with pytest.raises(ValueError, match=r"expected layers 0 to 2 of the model \(3\), got layers 0 to 1"):
        fasttc.attribute(model, fewer, prompt_ids)
    wider = random_set(tiny_model("llama", hidden_size=48))
    with pytest.raises(ValueError, match=r"width 32 .*got 48"):
        fasttc.attribute(model, wider, prompt_ids)


def test_bad_options(tiny_model, random_set, prompt_ids):
    model = tiny_model("llama")
    tcs = random_set(model)
    for options, message in (
        ({"memory_budget": 10}, r"memory_budget: expected at least \d+ bytes, for one target .*got 10"),
        ({"memory_budget": 0}, "memory_budget: expected a positive number of bytes"),
        ({"edge_share": 0}, r"edge_share: expected a number in \(0, 1\], got 0"),
        ({"edge_share": 1.1}, r"edge_share: expected a number in \(0, 1\], got 1.1"),
        ({"max_feature_nodes": 0}, "max_feature_nodes: expected a positive int, got 0"),
        ({"refresh": 0}, "refresh: expected a positive int, got 0"),
        ({"dtype": torch.bfloat16}, "dtype: expected torch.float32 or torch.float64, got torch.bfloat16"),
        ({"weight_dtype": torch.int8}, "weight_dtype: expected a floating-point dtype, got torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            fasttc.attribute(model, tcs, prompt_ids, **options)


def test_the_smallest_budget_named_is_enough(tiny_model, random_set, prompt_ids):
    model = tiny_model("llama")
    tcs = random_set(model)
    with pytest.raises(ValueError, match="expected at least") as error:
        fasttc.attribute(model, tcs, prompt_ids, memory_budget=10)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    assert fasttc.attribute(model, tcs, prompt_ids, memory_budget=needed).n_edges > 0
