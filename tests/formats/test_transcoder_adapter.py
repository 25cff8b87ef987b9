"""Adapters saved inside a whole model: read, named when broken, and never taken for anything else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasttc.formats import AdapterSet, TranscoderSet, sniff
from fasttc.testing import assert_same_bits, draw

D, F, LAYERS = 6, 10, 3


def tensors() -> dict[str, torch.Tensor]:
    found = {"model.embed_tokens.weight": draw("normal", 4, D)}
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp."
        found[mlp + "up_proj.weight"] = draw("normal", 8, D, seed=layer)
        found[mlp + "transcoder_enc.weight"] = draw("normal", F, D, seed=10 + layer)
        found[mlp + "transcoder_enc.bias"] = draw("normal", F, seed=20 + layer)
        found[mlp + "transcoder_dec.weight"] = draw("normal", D, F, seed=30 + layer)
        found[mlp + "transcoder_dec.bias"] = draw("normal", D, seed=40 + layer)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"architectures": ["Qwen2ForCausalLMWithTranscoder"], "transcoder_n_features": F}
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = tensors()
    first = {name: tensor for name, tensor in whole.items() if "layers.2" not in name}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(
        {n: t for n, t in whole.items() if n not in first}, tmp_path / "model-00002-of-00002.safetensors"
    )
    return tmp_path


def change(folder: Path, edit) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    content = load_file(file)
    edit(content)
    save_file(content, file)


def test_computes_what_the_modules_computed(folder):
    assert sniff(folder) == "transcoder-adapter"
    adapters = AdapterSet.from_pretrained(folder)
    whole, x = tensors(), draw("normal", 5, D)
    for layer, adapter in enumerate(adapters):
        mlp = f"model.layers.{layer}.mlp.transcoder_"
        f = torch.relu(torch.nn.functional.linear(x, whole[mlp + "enc.weight"], whole[mlp + "enc.bias"]))
        expected = f.double() @ whole[mlp + "dec.weight"].T.double() + whole[mlp + "dec.bias"].double()
        torch.testing.assert_close(adapter(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert_same_bits(adapter.W_dec.detach(), whole[mlp + "dec.weight"].T.contiguous())
    assert adapters.metadata["architectures"] == ["Qwen2ForCausalLMWithTranscoder"]


def test_without_a_decoder_bias(folder):
    change(folder, lambda content: content.pop("model.layers.2.mlp.transcoder_dec.bias"))
    assert torch.equal(AdapterSet.from_pretrained(folder)[2].b_dec, torch.zeros(D))


def test_saves_natively(folder, tmp_path):
    AdapterSet.from_pretrained(folder).save_pretrained(tmp_path / "native")
    assert sniff(tmp_path / "native") == "fasttc"
    assert len(AdapterSet.from_pretrained(tmp_path / "native")) == LAYERS


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda c: c.pop("model.layers.2.mlp.transcoder_enc.bias"), r"layer 2: missing tensors \['b_enc'\]"),
        (
            lambda c: c.update({"model.layers.2.mlp.transcoder_enc.bias": torch.ones(F + 1)}),
            r"layer 2: b_enc expected shape \[10\], got \[11\]",
        ),
        (
            lambda c: c.update({"model.layers.2.mlp.transcoder_dec.weight": torch.ones(D)}),
            "layer 2: expected matrices",
        ),
        (
            lambda c: [c.update({k.replace("s.2", "s.4"): c.pop(k)}) for k in list(c)],
            r"expected adapters in layers 0 to 4, missing \[2, 3\]",
        ),
    ],
    ids=["missing", "shape", "vector", "gap"],
)
def test_broken_files_are_named(folder, edit, match):
    change(folder, edit)
    with pytest.raises(ValueError, match=match):
        AdapterSet.from_pretrained(folder)


def test_what_holds_no_adapters(folder):
    with pytest.raises(ValueError, match=r"expected a set of transcoders, .* holds adapters"):
        TranscoderSet.from_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"expected tensors named .*transcoder_enc.weight, found none"):
        AdapterSet.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"is in no known format; known: fasttc, circuit-tracer, transcoder-adapter"
    ):
        AdapterSet.from_pretrained(folder)
