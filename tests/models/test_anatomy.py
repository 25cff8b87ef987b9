"""Module paths and sizes, on every family, also inside PEFT wrappers."""

import pytest
import torch
from torch import nn

from fasttc.models import FAMILIES, ablated, anatomy, capture, default_sites, unwrap


def test_the_fixture_covers_every_family(tiny_model, family):
    assert anatomy(tiny_model(family)).family == family
    assert family in FAMILIES


def test_sizes_and_paths(tiny_model, family):
    model = tiny_model(family)
    parts = anatomy(model)
    grouped = family not in ("gpt2", "gpt_neox")
    assert (parts.n_layers, parts.d_model, parts.vocab_size, parts.max_positions) == (3, 32, 61, 64)
    assert (parts.n_heads, parts.n_kv_heads, parts.head_dim) == ((4, 2, 12) if grouped else (4, 4, 8))
    assert (parts.root, len(parts.layers)) == ("", 3)
    for layer in parts.layers:
        for path in (layer.block, layer.mlp, layer.mlp_norm, layer.attn, layer.attn_norm, layer.attn_output):
            assert isinstance(model.get_submodule(path), nn.Module)
        assert (layer.mlp_post_norm is not None) == family.startswith("gemma")
        assert (layer.attn_post_norm is not None) == family.startswith("gemma")
    assert parts.parallel == (family == "gpt_neox")
    assert parts.norm == ("layer" if family in ("gpt2", "gpt_neox") else "rms")
    assert parts.embed_scale == (32**0.5 if family.startswith("gemma") else 1.0)
    assert (parts.position_embed is not None) == (family == "gpt2")


def test_softcaps_and_windows(tiny_model):
    gemma = anatomy(tiny_model("gemma2"))
    assert (gemma.final_softcap, gemma.attn_softcap) == (3.0, 2.0)
    assert [layer.window for layer in gemma.layers] == [5, None, 5]
    assert [layer.window for layer in anatomy(tiny_model("mistral")).layers] == [5, 5, 5]
    assert [layer.window for layer in anatomy(tiny_model("llama")).layers] == [None] * 3
    assert not anatomy(tiny_model("gpt_neox", use_parallel_residual=False)).parallel


def test_each_part_plays_its_role(tiny_model, family):
    """The residual after a layer is rebuilt from the parts the anatomy names."""
    model = tiny_model(family)
    parts = anatomy(model)
    seen: dict[str, torch.Tensor] = {}

    def record(path):
        def hook(module, args, kwargs, output):
            tensor = kwargs.get("hidden_states", args[0] if args else None)
            seen[path + ".in"] = tensor
            seen[path] = output[0] if isinstance(output, tuple) else output

        return hook

    for layer in parts.layers:
        for path in vars(layer).values():
            if isinstance(path, str):
                model.get_submodule(path).register_forward_hook(record(path), with_kwargs=True)
    model(torch.tensor([[2, 7, 9, 30, 4, 11, 8]]))
    for layer in parts.layers:
        attn_out = seen[layer.attn_post_norm or layer.attn]
        mlp_out = seen[layer.mlp_post_norm or layer.mlp]
        resid = seen[layer.block + ".in"]
        torch.testing.assert_close(resid + attn_out + mlp_out, seen[layer.block])
        torch.testing.assert_close(seen[layer.attn_norm + ".in"], resid)
        torch.testing.assert_close(seen[layer.attn_norm], seen[layer.attn + ".in"])
        torch.testing.assert_close(
            seen[layer.mlp_norm + ".in"], resid if parts.parallel else resid + attn_out
        )
        torch.testing.assert_close(seen[layer.mlp_norm], seen[layer.mlp + ".in"])
        torch.testing.assert_close(seen[layer.attn_output], seen[layer.attn])
        heads = (
            3 * parts.n_heads
            if layer.attn_value.endswith(("c_attn", "query_key_value"))
            else parts.n_kv_heads
        )
        assert seen[layer.attn_value].shape[-1] == heads * parts.head_dim


def test_peft_paths(tiny_model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        tiny_model("qwen3"),
        peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj"], task_type="CAUSAL_LM"),
    )
    parts = anatomy(wrapped)
    assert parts.root == "base_model.model"
    assert unwrap(wrapped)[1] is wrapped.get_submodule(parts.root)
    assert type(wrapped.get_submodule(parts.layers[1].mlp)).__name__ == "Qwen3MLP"
    assert wrapped.get_submodule(parts.lm_head).weight.shape == (61, 32)


def test_bad_models(tiny_model):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="expected a transformers model"):
        anatomy(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        anatomy({})
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    with pytest.raises(
        ValueError, match=r"expected one of llama, qwen2, qwen3, mistral, .* got model type 'bert'"
    ):
        anatomy(transformers.BertModel(config))
    with pytest.raises(ValueError, match="expected a llama causal language model, got LlamaModel"):
        anatomy(tiny_model("llama").model)


def test_text_part_of_a_multimodal_model(ids):
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
        "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    parts = anatomy(model)
    assert (parts.family, parts.n_layers, parts.d_model, parts.max_positions) == ("gemma3", 2, 32, 64)
    assert all("vision" not in layer.mlp for layer in parts.layers)
    sites = default_sites(model)
    with capture(model, sites) as record:
        before = model(ids).logits
    assert record.y[1].shape == (2, 9, 32)
    with ablated(model):
        assert not torch.equal(model(ids).logits, before)
