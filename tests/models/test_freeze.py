"""ffn_parameters(): MLPs and nothing else."""

import pytest
import torch

from fasttc.models import anatomy, ffn_parameters


def test_only_mlps(tiny_model, family):
    model = tiny_model(family)
    names = ffn_parameters(model)
    parameters = dict(model.named_parameters())
    inside = {
        id(parameter)
        for layer in anatomy(model).layers
        for parameter in model.get_submodule(layer.mlp).parameters()
    }
    assert names
    assert {id(parameters[name]) for name in names} == inside
    per_layer = {"gpt2": 4, "gpt_neox": 4, "llama": 6}.get(family, 3)
    assert len(names) == 3 * per_layer == len(set(names))
    rest = [name for name in parameters if name not in names]
    assert not any("mlp." in name for name in rest)
    for part in ("ln_" if family == "gpt2" else "norm", "att", "wte" if family == "gpt2" else "embed"):
        assert any(part in name for name in rest)


def test_training_them_leaves_the_rest_bit_identical(tiny_model, ids):
    model = tiny_model("qwen3")
    names = set(ffn_parameters(model))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(ids, labels=ids).loss.backward()
    optimiser.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names)


def test_inside_peft(tiny_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(tiny_model("mistral"), config)
    names = ffn_parameters(model)
    known = dict(model.named_parameters())
    assert all(name in known for name in names)
    assert "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight" in names
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight" in names
    assert len(names) == 3 * 5
