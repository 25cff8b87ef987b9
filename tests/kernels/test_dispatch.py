"""The cost model: what it prefers where, what explain says, and that a named implementation is never replaced."""

import subprocess
import sys

import pytest
import torch

from fasttc.ops import explain
from fasttc.ops._costs import COSTS, costs_of
from fasttc.ops._dispatch import _MODELS, choose

H200 = "NVIDIA H200"


def tokens(n=4096, d=2304, dtype=torch.bfloat16):
    return torch.empty(n, d, dtype=dtype, device="meta")


@pytest.mark.parametrize("op", ["decode", "decode_backward", "encode_backward"])
def test_sparse_where_few_are_active_and_dense_where_many_are(op):
    """The crossover lies at k/F = bandwidth / FLOP rate, 0.54 % on an H200: rows gathered against zeros multiplied."""
    assert choose("auto", op, tokens(), n_features=65536, k=64, device=H200).algorithm == "sparse"
    assert choose("auto", op, tokens(), n_features=16384, k=128, device=H200).algorithm == "dense"


def test_float32_is_never_dense():
    found = choose("auto", "decode", tokens(dtype=torch.float32), n_features=16384, k=256, device=H200)
    assert found.algorithm == "sparse"


def test_the_choice_is_the_cheapest_and_no_faster_than_its_roof():
    for costs in COSTS:
        for op in _MODELS:
            found = choose("auto", op, tokens(), n_features=65536, k=64, device=costs.name)
            assert found.impl == "triton"
            assert 0 < found.roof <= found.seconds


def test_the_predicted_encode_is_the_gemm_and_a_little():
    """Half-precision GEMM of 4096 x 2304 x 65536 at 790 TFLOP/s: 1.57 ms."""
    found = choose("auto", "encode", tokens(), n_features=65536, k=64, device=H200)
    assert found.roof == pytest.approx(1.566e-3, rel=1e-3)
    assert found.seconds < 1.25 * found.roof


def test_explain_says_what_why_and_how_far_from_the_roof():
    text = explain("encode", tokens(), n_features=65536, k=64, device=H200)
    assert text.startswith("triton: encode on NVIDIA H200, our GEMM (else the vendor's GEMM ")
    assert "; predicted 1." in text
    assert "ms, roof 1.57 ms (" in text


def test_an_unknown_device_takes_the_costs_of_its_architecture():
    assert costs_of("NVIDIA H200 NVL", "sm_90").name == H200
    assert costs_of("NVIDIA GH999", "sm_90").architecture == "sm_90"


def test_an_unknown_architecture_is_said(monkeypatch):
    from fasttc.kernels import _launch

    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_103")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GB300")
    x = tokens()
    monkeypatch.setattr(type(x), "is_cuda", property(lambda self: True))
    assert "(sm_103 has no configs of its own and uses those of sm_100)" in explain(
        "encode", x, n_features=4096, k=8
    )
    assert "uses those of sm_100" in explain("encode", x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"op": "dream", "n_features": 8, "k": 2, "device": H200},
            "op: expected one of encode, .* got 'dream'",
        ),
        ({"op": "dream"}, "op: expected one of encode, .* got 'dream'"),
        ({"op": "encode", "device": "abacus"}, "device: expected one of NVIDIA A100, .* got 'abacus'"),
        (
            {"op": "encode", "impl": "cuda"},
            "impl: expected one of auto, reference, torch, triton, got 'cuda'",
        ),
    ],
)
def test_names_that_do_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        explain(x=tokens(), **arguments)


def test_a_cpu_takes_torch_and_refuses_triton_without_the_interpreter():
    code = """
import sys, torch
from fasttc import ops
x, W, b = torch.ones(2, 4), torch.ones(6, 4), torch.ones(6)
assert ops.explain("encode", x).startswith("torch: "), ops.explain("encode", x)
try:
    ops.encode(x, W, b, k=2, impl="triton")
except ValueError as error:
    assert "expected a tensor on a GPU, got one on cpu" in str(error) and "TRITON_INTERPRET=1" in str(error), error
else:
    raise SystemExit("not refused")
assert "triton" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
