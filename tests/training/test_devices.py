"""Models spread over devices, transcoders somewhere else: what of it can be seen on a CPU."""

import pytest
import torch

from fasttc.models import load
from fasttc.training import train

OPTIONS = {
    "n_features": 48,
    "k": 6,
    "tokens": 64 * 4,
    "batch_size": 4,
    "progress": False,
    "validation_tokens": 200,
}


def same_bits(one, two):
    return all(
        torch.equal(a, b)
        for s, t in zip(one, two, strict=True)
        for a, b in zip(s.parameters(), t.parameters(), strict=True)
    )


def test_a_model_whose_weights_are_fetched_when_they_are_needed(tiny_model, data):
    """accelerate's hooks on every module, and parameters on the meta device: as a device_map leaves them."""
    accelerate = pytest.importorskip("accelerate")
    expected, _ = train(tiny_model("llama"), data, **OPTIONS)
    spread = accelerate.cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    assert next(spread.parameters()).is_meta
    found, _ = train(spread, data, **OPTIONS)
    assert same_bits(found, expected)


def test_transcoders_go_where_they_are_sent(tiny_model, data):
    model = tiny_model("llama")
    assert same_bits(train(model, data, device="cpu", **OPTIONS)[0], train(model, data, **OPTIONS)[0])
    with pytest.raises(ValueError, match="device: expected one of this machine, got 'cuda:99'"):
        train(model, data, device="cuda:99", **OPTIONS)


def test_device_maps(tiny_model, tmp_path):
    pytest.importorskip("accelerate")
    tiny_model("llama").save_pretrained(tmp_path)
    plain, _ = load(tmp_path)
    spread, _ = load(tmp_path, device_map={"": "cpu"})
    for one, two in zip(plain.parameters(), spread.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match="device_map: expected none beside device 'cpu', got 'auto'"):
        load(tmp_path, device="cpu", device_map="auto")
