"""JumpReLU, ReLU and BatchTopK as CSR against the oracle: order, windows, overflow of the buffers, chunks."""

import pytest
import torch

from fasttc.kernels.batch import launch_encode_batch_topk
from fasttc.kernels.encode import launch_pre_activations
from fasttc.kernels.threshold import ACTIVE, WINDOW, launch_compact, launch_encode_threshold
from fasttc.ops import reference
from fasttc.testing import assert_same_bits, draw, draw_coder

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [  # N, D, F
    pytest.param(1, 1, 1, id="one-of-each"),
    pytest.param(5, 11, 67, id="primes"),
    pytest.param(0, 8, 40, id="empty-batch"),
    pytest.param(2, 8, 1100, id="more-groups-than-a-block"),
]
GEMMS = pytest.mark.parametrize("gemm", ["tile", "vendor"])


def coder(n, d, f, dtype=torch.float32):
    made = draw_coder(f, d, kind="ties", dtype=dtype)
    return draw("ties", n, d, dtype=dtype, seed=7), made["W_enc"], made["b_enc"]


def thresholds(f):
    """Per feature, whole numbers and halves, so that equality with z occurs (and must not count as above)."""
    return draw("ties", f, seed=5) + 0.5 * draw("ties", f, seed=6)


def check_threshold(got, x, W, b, theta, bandwidth):
    z = reference.pre_activations(x, W, b)
    values, indices, row_ptr, gates = reference.threshold(z, theta, bandwidth)
    assert_same_bits(got.row_ptr, row_ptr, name="row_ptr")
    assert_same_bits(got.indices, indices, name="indices")
    assert_same_bits(got.values + 0.0, values + 0.0, name="values")
    if bandwidth is None:
        assert got.flags is None
        return
    entries = z[torch.arange(len(z)).repeat_interleave(row_ptr.diff()), indices.long()]
    window = (entries - theta.expand(z.shape[1])[indices.long()]).abs() < bandwidth / 2
    assert_same_bits((got.flags & ACTIVE).float(), gates, name="gates")
    assert_same_bits((got.flags & WINDOW) > 0, window, name="window")


@GEMMS
@pytest.mark.parametrize("bandwidth", [None, 1.5])
@pytest.mark.parametrize(("n", "d", "f"), SHAPES)
def test_thresholds_per_feature(n, d, f, bandwidth, gemm):
    x, W, b = coder(n, d, f)
    theta = thresholds(f)
    got = launch_encode_threshold(x, W, b, theta, bandwidth=bandwidth, gemm=gemm)
    check_threshold(got, x, W, b, theta, bandwidth)


@pytest.mark.parametrize("theta", [0.0, 1.0, -1e9, 1e9], ids=["relu", "one", "all", "none"])
def test_one_threshold_for_all(theta):
    x, W, b = coder(4, 8, 50)
    for bandwidth in (None, 3.0):
        got = launch_encode_threshold(x, W, b, torch.tensor(theta), bandwidth=bandwidth)
        check_threshold(got, x, W, b, torch.tensor(theta), bandwidth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x, W, b = coder(4, 24, 50, dtype)
    got = launch_encode_threshold(x, W, b, thresholds(50), bandwidth=1.0)
    check_threshold(got, x, W, b, thresholds(50), 1.0)


@pytest.mark.parametrize("capacity", [0, 1, 7, 10_000])
def test_buffers_of_any_size_give_the_same_entries(capacity):
    x, W, b = coder(4, 8, 50)
    whole = launch_encode_threshold(x, W, b, thresholds(50), bandwidth=1.0)
    assert whole.values.shape[0] > 7
    got = launch_encode_threshold(x, W, b, thresholds(50), bandwidth=1.0, capacity=capacity)
    for name in ("values", "indices", "row_ptr", "flags"):
        assert_same_bits(getattr(got, name), getattr(whole, name), name=name)


def test_chunks_of_rows_are_joined():
    x, W, b = coder(130, 4, 20)
    got = launch_encode_threshold(x, W, b, thresholds(20), bandwidth=1.0, scratch_bytes=1, capacity=3)
    check_threshold(got, x, W, b, thresholds(20), 1.0)


def test_a_row_does_not_depend_on_its_batch():
    x, W, b = coder(9, 8, 60)
    x = x + 0.1 * draw("normal", 9, 8, seed=11)
    whole = launch_encode_threshold(x, W, b, thresholds(60))
    alone = launch_encode_threshold(x[4:6], W, b, thresholds(60))
    first, last = int(whole.row_ptr[4]), int(whole.row_ptr[6])
    assert_same_bits(alone.values, whole.values[first:last])
    assert_same_bits(alone.indices, whole.indices[first:last])


@pytest.mark.parametrize("batch", [False, True], ids=["thresholds", "batch"])
def test_ten_runs_give_the_same_bits(batch):
    x, W, b = coder(3, 8, 40)

    def run():
        if batch:
            return launch_encode_batch_topk(x, W, b, 7)
        return launch_encode_threshold(x, W, b, thresholds(40), bandwidth=1.0)

    first = run()
    for _ in range(9):
        again = run()
        for name in ("values", "indices", "row_ptr") + (() if batch else ("flags",)):
            assert_same_bits(getattr(again, name), getattr(first, name), name=name)


def test_rows_beyond_2_to_the_31_elements(huge, overflow_checked):
    x, W, b = coder(5, 8, 40)
    scratch = huge(5 * 2**29, dtype=torch.float32).as_strided((5, 48), (2**29, 1))
    theta = thresholds(40)
    chunk = launch_pre_activations(x, W, b, shift=theta, scratch=scratch)
    got = launch_compact(chunk, theta=theta, half=0.5, flags=True)
    check_threshold(got, x, W, b, theta, 1.0)


# --- BatchTopK -------------------------------------------------------------------------------------------------


def check_batch(got, x, W, b, k, relu=True):
    values, indices, row_ptr = reference.batch_topk(reference.pre_activations(x, W, b), k, relu)
    assert_same_bits(got.row_ptr, row_ptr, name="row_ptr")
    assert_same_bits(got.indices, indices, name="indices")
    assert_same_bits(got.values, values, name="values")


@GEMMS
@pytest.mark.parametrize(
    ("n", "d", "f", "k"),
    [
        pytest.param(1, 1, 1, 1, id="one-of-each"),
        pytest.param(5, 11, 67, 3, id="primes"),
        pytest.param(4, 8, 20, 20, id="k=F"),
        pytest.param(3, 8, 200, 50, id="fewer-groups-than-entries"),
        pytest.param(0, 8, 40, 3, id="empty-batch"),
    ],
)
def test_the_largest_of_the_batch(n, d, f, k, gemm):
    x, W, b = coder(n, d, f)
    check_batch(launch_encode_batch_topk(x, W, b, k, gemm=gemm), x, W, b, k)


@pytest.mark.parametrize(
    ("k", "strongest", "relu"), [(1, 0, True), (1, 129, True), (15, 64, False)], ids=["first", "last", "many"]
)
def test_chunks_compete_for_the_same_places(k, strongest, relu):
    x, W, b = coder(130, 4, 20)
    x[strongest] *= 8  # one chunk holds most of the largest
    got = launch_encode_batch_topk(x, W, b, k, relu=relu, scratch_bytes=1)
    check_batch(got, x, W, b, k, relu)


def test_all_equal_takes_the_first_tokens():
    x, W, b = torch.ones(4, 3), torch.ones(10, 3), torch.zeros(10)
    got = launch_encode_batch_topk(x, W, b, 4)
    assert got.row_ptr.tolist() == [0, 10, 16, 16, 16]
