"""FTFA: the MLPs learn, nothing else moves by a bit, and the report proves it."""

import hashlib
import sys

import pytest
import torch
from torch.nn import functional as F

from fasttc.models import anatomy, ffn_parameters, load, recomputed
from fasttc.training import TokenData, finetune, finetune_ffn
from fasttc.training.causal import CausalTask, NextToken, cross_entropy, hash_tensors

OPTIONS = {"tokens": 64 * 10, "batch_size": 4, "progress": False, "validation_tokens": 400, "lr": 1e-2}


def test_only_mlps_move_in_every_family(tiny_model, family, data):
    model = tiny_model(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tuned, report = finetune(model, data, **OPTIONS)
    names = set(ffn_parameters(model))
    assert set(report.trained) == names
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]), "the original is untouched"
    moved = {name for name, t in tuned.named_parameters() if not torch.equal(t, before[name])}
    assert moved == names
    assert report.sha256_before == report.sha256_after
    n_tensors = len([*model.named_parameters(), *model.named_buffers()])
    assert report.frozen == n_tensors - len(names)
    assert report.trained_parameters == sum(before[name].numel() for name in names)
    assert report.ce_after < report.ce_before


def test_the_hash_is_over_every_bit(tiny_model):
    model = tiny_model("llama")
    names = ffn_parameters(model)
    count, digest = hash_tensors(model, exclude=names)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1
    assert hash_tensors(model, exclude=names) == (count, digest)
    weight = model.model.layers[2].self_attn.q_proj.weight
    with torch.no_grad():
        weight.view(torch.int32)[0, 0] ^= 1
    assert hash_tensors(model, exclude=names)[1] != digest
    whole = hashlib.sha256()
    pair = torch.nn.Linear(2, 1).bfloat16()
    for name in ("bias", "weight"):
        tensor = getattr(pair, name)
        whole.update(f"{name} torch.bfloat16 {list(tensor.shape)}\n".encode())
        whole.update(tensor.detach().view(torch.int16).numpy().tobytes())
    assert hash_tensors(pair) == (2, whole.hexdigest())


def test_a_frozen_tensor_that_moves_is_an_error(tiny_model, data):
    model = tiny_model("llama")

    def nudge(progress):
        with torch.no_grad():
            progress.task.model.model.norm.weight += 1e-3

    with pytest.raises(RuntimeError, match="frozen tensors changed: sha256"):
        finetune(model, data, callbacks=[nudge], **OPTIONS)


def test_inplace_flags_and_modes_come_back(tiny_model, data):
    model = tiny_model("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    same = finetune_ffn(model, data, inplace=True, **OPTIONS)
    assert same is model
    assert model.training
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_all_parameters_can_train(tiny_model, data):
    model = tiny_model("gemma2")
    tuned, report = finetune(model, data, parameters="all", **(OPTIONS | {"tokens": 64 * 60}))
    changed = [
        n for n, p in tuned.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])
    ]
    assert len(changed) == len(list(model.named_parameters()))
    assert report.ce_after < report.ce_before - 0.5
    with pytest.raises(TypeError, match="trains the MLPs only"):
        finetune_ffn(model, data, parameters="all")
    with pytest.raises(ValueError, match="parameters: expected one of ffn, all, lora, got 'attn'"):
        finetune(model, data, parameters="attn")


def test_bfloat16_models_learn_through_masters(tiny_model, data):
    model = tiny_model("llama", dtype=torch.bfloat16)
    tuned, report = finetune(model, data, **(OPTIONS | {"lr": 1e-3, "tokens": 64 * 40}))
    assert tuned.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert report.ce_after < report.ce_before - 0.02


def test_peft_models(tiny_model, data):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up_proj"])
    model = peft.get_peft_model(tiny_model("llama"), config)
    _, report = finetune(model, data, **OPTIONS)
    assert any("lora_A" in name for name in report.trained)
    assert report.ce_after < report.ce_before


def test_lora_trains_matrices_and_merges_them(tiny_model, family, data):
    pytest.importorskip("peft")
    model = tiny_model(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tuned, report = finetune(model, data, parameters="lora", lora_rank=2, **OPTIONS)
    assert type(tuned) is type(model)
    assert tuned.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(".lora_" in name for name in report.trained)
    assert report.frozen == len([*model.named_parameters(), *model.named_buffers()])
    assert report.sha256_before == report.sha256_after
    assert report.ce_after < report.ce_before
    matrices = {n for layer in anatomy(model).layers for n, p in _matrices(model, layer.block)}
    for name, tensor in tuned.named_parameters():
        change = tensor - before[name]
        assert (name in matrices) == bool(change.any()), name
        if name in matrices:
            assert int(torch.linalg.matrix_rank(change.double(), rtol=1e-5)) <= 2
    tuned(torch.tensor([[5, 6]]))


def _matrices(model, block):
    return [(n, p) for n, p in model.named_parameters() if n.startswith(block + ".") and p.ndim == 2]


def test_lora_in_place_leaves_no_trace_when_it_fails(tiny_model, data, interrupt):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    before = hash_tensors(model)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, data, parameters="lora", inplace=True, callbacks=[interrupt(3)], **OPTIONS)
    assert hash_tensors(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="model: expected one without wrappers for 'lora'"):
        finetune(wrapped, data, parameters="lora", **OPTIONS)


@pytest.mark.parametrize(("options", "words"), [
    ({"lora_rank": 0}, "lora_rank: expected an int >= 1, got 0"),
    ({"lora_alpha": -1.0}, "lora_alpha: expected a number > 0, got -1.0"),
])  # fmt: skip
def test_wrong_options_of_lora(tiny_model, data, options, words):
    with pytest.raises(ValueError, match=words):
        finetune(tiny_model("llama"), data, parameters="lora", **options)


def test_lora_without_peft_says_what_to_install(tiny_model, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs peft: pip install 'fasttc\[finetune\]'"):
        finetune(tiny_model("llama"), data, parameters="lora", **OPTIONS)


def test_training_that_changes_nothing_is_an_error(tiny_model, data):
    with pytest.raises(
        ValueError, match="data: expected text that changes the model, but 10 steps left every"
    ):
        finetune(tiny_model("llama", dtype=torch.bfloat16), data, **(OPTIONS | {"lr": 1e-9}))


@pytest.mark.parametrize("pieces", [2**26, 61 * 7])
def test_next_token_loss_and_gradient(tiny_model, family, data, monkeypatch, pieces):
    monkeypatch.setattr("fasttc.training.causal.LOGITS_AT_ONCE", pieces)
    model = tiny_model(family)
    batch = next(data.batches("train", 3))
    total, count = NextToken(model)(batch)
    logits = model(**batch.model_inputs).logits
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    assert count == int((batch.labels != -100).sum())
    name = ffn_parameters(model)[0]
    parameter = model.get_parameter(name)
    ours, theirs = (torch.autograd.grad(loss, parameter)[0] for loss in (total, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_nothing_to_predict_is_an_error(tiny_model):
    data = TokenData([[5], [6], [7]], context=2, fractions=(0, 1, 0))
    with pytest.raises(ValueError, match="documents of at least two tokens"):
        cross_entropy(tiny_model("llama"), data.batches("validation", 2))


def test_pubmedqa_gets_easier_and_the_folder_loads_again(shared_data, tmp_path):
    model, tokenizer = load(shared_data / "models" / "stories260K")
    options = {"tokens": 16_384, "lr": 1e-3, "validation_tokens": 4096, "progress": False}
    tuned, report = finetune(
        model,
        shared_data / "pubmedqa" / "ori_pqal.json",
        tokenizer,
        text="{QUESTION} {CONTEXTS} {LONG_ANSWER}",
        out=tmp_path / "ft",
        **options,
    )
    assert 4.3 < report.ce_before < 5.2
    assert report.ce_after < report.ce_before - 0.7
    again, same_tokenizer = load(tmp_path / "ft")
    assert same_tokenizer("cell").input_ids == tokenizer("cell").input_ids
    for one, two in zip(again.parameters(), tuned.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rows", [1, 3])
def test_micro_batches_change_memory_not_the_result(tiny_model, data, rows):
    model = tiny_model("llama", dtype=torch.float64)
    whole, _ = finetune(model, data, **OPTIONS)
    parts, _ = finetune(model, data, micro_batch=rows, **OPTIONS)
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9 * float(one.abs().max()))


def test_micro_batches_of_bfloat16_add_up_in_float32(tiny_model, data):
    model = tiny_model("llama", dtype=torch.bfloat16)
    names = ffn_parameters(model)[:1]
    task = CausalTask(model, names, rows=1, betas=(0.9, 0.99), weight_decay=0.0, clip=0.0)
    batch = next(data.batches("train", 4))
    task.backward(batch)
    (got,) = task.optimiser.gradients()
    assert got.dtype == torch.float32
    expected = torch.zeros_like(got)
    loss, count = NextToken(model), int((batch.labels != -100).sum())
    for row in range(4):
        (loss(batch.take(slice(row, row + 1)))[0] / count).backward()
        parameter = model.get_parameter(names[0])
        expected += parameter.grad.float()
        parameter.grad = None
    assert torch.equal(got, expected)


def test_checkpointing_keeps_the_bits(tiny_model, family, data):
    model = tiny_model(family)
    kept, _ = finetune(model, data, **OPTIONS)
    again, _ = finetune(model, data, checkpointing=True, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), again.parameters(), strict=True))
    assert "forward" not in vars(again.get_submodule(anatomy(again).layers[0].block))


def test_checkpointing_keeps_fewer_activations(tiny_model, data):
    model = tiny_model("llama")
    batch = next(data.batches("train", 4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        NextToken(model)(batch)
        before = sum(kept)
        kept.clear()
        with recomputed(model):
            NextToken(model)(batch)
    assert sum(kept) < before / 4


def test_8bit_adam(tiny_model, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ValueError, match="optimiser: 'adamw8bit' needs bitsandbytes: pip install bitsandbytes"
    ):
        finetune(tiny_model("llama"), data, optimiser="adamw8bit", **OPTIONS)
    with pytest.raises(ValueError, match="optimiser: expected one of adamw, adamw8bit, got 'sgd'"):
        finetune(tiny_model("llama"), data, optimiser="sgd")
    with pytest.raises(ValueError, match="micro_batch: expected an int >= 1, got 0"):
        finetune(tiny_model("llama"), data, micro_batch=0)
