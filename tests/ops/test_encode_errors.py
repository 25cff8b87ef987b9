"""Every error of ops.encode names what was expected and what came."""

import math

import pytest
import torch

from fasttc import ops

GOOD = {"x": torch.ones(3, 4), "W_enc": torch.ones(6, 4), "b_enc": torch.ones(6), "k": 2}
BAD = [
    ({"x": [1.0]}, TypeError, r"x: expected a tensor \[\.\.\., 4\], got list"),
    ({"x": torch.ones(3, 5)}, ValueError, r"x: expected shape \[\.\.\., 4\], got \[3, 5\]"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[\.\.\., 4\], got \[\]"),
    ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x: expected float16, .* got torch.int64"),
    ({"W_enc": 3}, TypeError, r"W_enc: expected a tensor \[F, D\], got int"),
    ({"W_enc": torch.ones(6)}, ValueError, r"W_enc: expected shape \[F, D\], got \[6\]"),
    (
        {"W_enc": torch.ones(6, 4, dtype=torch.int32)},
        TypeError,
        "W_enc: expected float16, .* got torch.int32",
    ),
    ({"b_enc": None}, TypeError, r"b_enc: expected a tensor \[6\], got NoneType"),
    ({"b_enc": torch.ones(5)}, ValueError, r"b_enc: expected shape \[6\], got \[5\]"),
    ({"k": None}, ValueError, "expected exactly one of k and threshold, got k=None and threshold=None"),
    ({"threshold": 0.0}, ValueError, "expected exactly one of k and threshold, got k=2 and threshold=0.0"),
    ({"k": 0}, ValueError, "k: expected 1 <= k <= F = 6, got 0"),
    ({"k": 7}, ValueError, "k: expected 1 <= k <= F = 6, got 7"),
    ({"k": 2.0}, TypeError, "k: expected an int, got float"),
    ({"k": True}, TypeError, "k: expected an int, got bool"),
    ({"scope": "row"}, ValueError, "scope: expected 'token' or 'batch', got 'row'"),
    ({"bandwidth": 0.1}, ValueError, r"bandwidth: expected None with k .* got 0.1"),
    ({"k": None, "threshold": 0.0, "scope": "batch"}, ValueError, "scope: expected 'token' with threshold"),
    ({"k": None, "threshold": torch.ones(5)}, ValueError, r"threshold: expected shape \[6\], got \[5\]"),
    (
        {"k": None, "threshold": 0.0, "bandwidth": 0.0},
        ValueError,
        "bandwidth: expected a number > 0, got 0.0",
    ),
    (
        {"k": None, "threshold": 0.0, "bandwidth": math.nan},
        ValueError,
        "bandwidth: expected a number > 0, got nan",
    ),
    ({"x": torch.ones(3, 4, device="meta")}, ValueError, "expected all tensors on one device, got x on meta"),
    ({"impl": "cuda"}, ValueError, "impl: expected one of auto, reference, torch, triton, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[match[:40] for _, _, match in BAD])
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        ops.encode(**{**GOOD, **change})
