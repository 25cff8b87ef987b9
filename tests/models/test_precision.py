"""Inside float64_exact nothing of a model is computed in float32."""

import json
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttc.models import anatomy, float64_exact, normalized

IDS = torch.tensor([[2, 7, 9, 30, 4, 11, 8, 41, 17]])


class OnlyFloat64(TorchDispatchMode):
    """Records every operation that takes or makes a floating-point tensor of another dtype."""

    def __init__(self):
        super().__init__()
        self.narrow: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        for value in (*args, *outputs):
            if torch.is_tensor(value) and value.is_floating_point() and value.dtype != torch.float64:
                self.narrow.append(f"{func} {value.dtype}")
        return out


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_no_narrow_operation_is_left(tiny_model, family):
    model = tiny_model(family).double()
    with OnlyFloat64() as plain, torch.no_grad():
        model(IDS)
    if family != "gpt2":  # which rounds nothing, so that the counter-check has nothing to find
        assert plain.narrow
    with float64_exact(model), OnlyFloat64() as exact:
        loss = model(IDS, labels=IDS, use_cache=True).loss
        loss.backward()
    assert not exact.narrow, exact.narrow[:5]
    assert loss.dtype == torch.float64


def test_constants_are_not_rounded(tiny_model, family):
    model = tiny_model(family).double()
    theta = {"gemma3": (10_000.0, 1_000_000.0)}.get(family, (10_000.0,))
    size = 2 if family == "gpt_neox" else 12
    expected = [
        torch.tensor([base ** (-i / size) for i in range(0, size, 2)], dtype=torch.float64) for base in theta
    ]
    with float64_exact(model):
        frequencies = [
            b for name, b in model.named_buffers() if name.endswith("inv_freq") and "original" not in name
        ]
        scales = [buffer for name, buffer in model.named_buffers() if name.endswith("embed_scale")]
    assert bool(frequencies) == (family != "gpt2")
    for frequency in frequencies:
        assert min((frequency - wanted).abs().max() for wanted in expected) < 1e-15
    for scale in scales:
        assert scale.item() == math.sqrt(32)


def test_response_to_a_tiny_step_is_linear(tiny_model, family):
    """A step of 1e-9 moves the logits along the derivative; float32 rounding (6e-8) would bury it."""
    model = tiny_model(family).double()
    embedding = model.get_submodule(anatomy(model).embed)
    generator = torch.Generator().manual_seed(1)
    inputs = embedding(IDS).detach()
    direction = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)

    def out(x):
        return model(inputs_embeds=x).logits

    def relative_error(step):
        with torch.no_grad():
            difference = (out(inputs + step * direction) - out(inputs - step * direction)) / (2 * step)
        return ((difference - derivative).norm() / derivative.norm()).item()

    with float64_exact(model):
        _, derivative = torch.autograd.functional.jvp(out, inputs, direction)
        # rounding 1e-16 over a step of 1e-9, times the logits over the derivative (about one)
        assert relative_error(1e-9) < 1e-5
        assert relative_error(1e-6) < 1e-7
    if family != "gpt2":
        assert relative_error(1e-9) > 1e-3


def test_oracle_logits(shared_data):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    for case in ("gemma2_jumprelu", "llama_topk_skip"):
        folder = shared_data / "oracle" / case
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "hf_model", attn_implementation="eager"
        )
        model = model.double().eval()
        ids = torch.tensor([json.loads((folder / "prompt.json").read_text())["input_ids"]])
        expected = load_file(folder / "ct_graph_f64.safetensors")["last_logits"]
        before = logits(model, ids)
        with float64_exact(model):
            inside = logits(model, ids)
        assert (before[0, -1] - expected).abs().max() > 1e-7
        assert (inside[0, -1] - expected).abs().max() < 1e-12
        assert torch.equal(logits(model, ids), before)


def test_everything_is_restored_after_an_exception(tiny_model, family):
    model = tiny_model(family).double()
    before = logits(model)
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    with pytest.raises(RuntimeError, match="stop"), float64_exact(model), float64_exact(model):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.get_default_dtype() == torch.float32


def test_only_the_model_is_affected(tiny_model):
    model = tiny_model("llama").double()
    with float64_exact(model):
        model(IDS)
        assert torch.ones(2).dtype == torch.float32
        assert torch.ones(2, dtype=torch.float64).float().dtype == torch.float32


def test_parts_called_one_by_one(tiny_model, family):
    model = tiny_model(family).double()
    parts = anatomy(model)
    norm = model.get_submodule(parts.layers[1].mlp_norm)
    resid = torch.randn(3, 32, dtype=torch.float64)
    centred = resid - resid.mean(-1, keepdim=True) if parts.norm == "layer" else resid
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + parts.norm_eps).sqrt()
    gain = norm.weight + parts.gain_offset
    bias = norm.bias if parts.norm == "layer" else 0.0
    with float64_exact(model):
        assert (normalized(norm, resid) - expected).abs().max() < 1e-14
        assert (norm(resid) - (expected * gain + bias)).abs().max() < 1e-14
        trunk = model.get_submodule(parts.trunk)(IDS).last_hidden_state
        raw = model.get_submodule(parts.lm_head)(trunk)
        cap = parts.final_softcap
        assert (logits(model) - (raw if cap is None else cap * torch.tanh(raw / cap))).abs().max() < 1e-13
    if parts.norm == "rms":
        assert (normalized(norm, resid) - expected).abs().max() > 1e-10


def test_token_by_token_with_a_cache(tiny_model, family):
    model = tiny_model(family).double()
    steps, cache = [], None
    with float64_exact(model), torch.no_grad():
        for position in range(IDS.shape[1]):
            out = model(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        assert (torch.cat(steps, 1) - logits(model)).abs().max() < 1e-12
        assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 12)


def test_gpt2_upcast_attention(tiny_model):
    plain = tiny_model("gpt2").double()
    upcast = tiny_model("gpt2", reorder_and_upcast_attn=True).double()
    with float64_exact(upcast):
        assert (logits(upcast) - logits(plain)).abs().max() < 1e-13
    assert all(block.attn.reorder_and_upcast_attn for block in upcast.transformer.h)


def test_peft_wrapper(tiny_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    plain = tiny_model("qwen2").double()
    with float64_exact(plain):
        expected = logits(plain)
    wrapped = peft.get_peft_model(plain, config).double().eval()
    with float64_exact(wrapped), OnlyFloat64() as exact:
        out = logits(wrapped)
    assert not exact.narrow
    assert (out - expected).abs().max() < 1e-13


def test_errors(tiny_model):
    with (
        pytest.raises(
            ValueError, match=r"expected a model in float64 \(model.double\(\)\), got torch.float32 in"
        ),
        float64_exact(tiny_model("llama")),
    ):
        pass
    model = tiny_model("llama").double()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="expected eager attention, got 'sdpa'"), float64_exact(model):
        pass
    with pytest.raises(ValueError, match="expected a transformers model"), float64_exact(nn.Linear(2, 2)):
        pass
