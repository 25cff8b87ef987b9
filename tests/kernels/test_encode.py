"""TopK encode against the oracle: exact where products are exact, else within a budget; any batch, chunk or tile."""

import pytest
import torch

from fasttc.kernels import select
from fasttc.kernels._launch import config
from fasttc.kernels.certificate import launch_encode_topk_certified
from fasttc.kernels.encode import launch_encode_topk, launch_pre_activations, row_chunks
from fasttc.ops import reference
from fasttc.testing import assert_same_bits, assert_within_budget, draw, draw_coder

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [  # N, D, F, k
    pytest.param(1, 1, 1, 1, id="one-of-each"),
    pytest.param(7, 37, 131, 5, id="primes"),
    pytest.param(3, 16, 20, 20, id="K=F"),
    pytest.param(130, 24, 140, 9, id="odd-of-blocks"),
    pytest.param(0, 8, 40, 3, id="empty-batch"),
]
SMALL = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 2}
CONFIGS = {
    "default": None,
    "pointers": config(4, 1, **SMALL, DESCRIPTOR=False, PARTS=1),
    "descriptors": config(4, 1, **SMALL, DESCRIPTOR=True, PARTS=2),
}
WAYS = {
    "tile": lambda *args, **options: launch_encode_topk(*args, gemm="tile", **options),
    "vendor": lambda *args, **options: launch_encode_topk(*args, gemm="vendor", **options),
    "certificate": launch_encode_topk_certified,
}


def coder(n, d, f, kind="ties", dtype=torch.float32):
    made = draw_coder(f, d, kind=kind, dtype=dtype)
    return draw(kind, n, d, dtype=dtype, seed=7), made["W_enc"], made["b_enc"]


def check_exact(got, x, W, b, k, relu=True):
    """``ties`` inputs: every sum is exact in float32, so kernel and oracle must agree in every bit."""
    values, indices = reference.topk(reference.pre_activations(x, W, b), k, relu)
    assert_same_bits(got[1], indices, name="indices")
    assert_same_bits(got[0], values, name="values")


def check_within_budget(got, x, W, b, k):
    values, indices = got
    exact = reference.pre_activations(x.double(), W.double(), b.double())
    eager = reference.pre_activations(x, W, b)
    terms = float((x.double().abs() @ W.double().abs().T).max())
    at = indices.long()
    assert_within_budget(values, exact.gather(1, at).relu(), eager.gather(1, at).relu(), magnitude=terms)
    assert bool((indices.diff(dim=1) > 0).all()), "indices ascend"
    slack = 4 * torch.finfo(torch.float32).eps * terms
    others = exact.scatter(1, at, float("-inf")).max(1).values
    worst = exact.gather(1, at).min(1).values
    assert bool((worst >= others - slack).all()), "nothing larger was left out"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("n", "d", "f", "k"), SHAPES)
def test_against_the_oracle(n, d, f, k, way):
    x, W, b = coder(n, d, f)
    check_exact(WAYS[way](x, W, b, k), x, W, b, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_real_numbers_in_every_dtype(way, dtype):
    x, W, b = coder(9, 40, 300, "normal", dtype)
    check_within_budget(WAYS[way](x, W, b, 6), x, W, b, 6)


@pytest.mark.parametrize("tiles", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_by_pointer_and_by_descriptor(tiles, dtype):
    x, W, b = coder(37, 40, 203, dtype=dtype)
    check_exact(launch_encode_topk(x, W, b, 7, config=CONFIGS[tiles]), x, W, b, 7)


@pytest.mark.parametrize("way", WAYS)
def test_all_equal_selects_the_lowest_indices(way):
    x, W, b = torch.ones(3, 4), torch.ones(150, 4), torch.zeros(150)
    _, indices = WAYS[way](x, W, b, 6)
    assert indices.tolist() == [list(range(6))] * 3


@pytest.mark.parametrize("relu", [True, False])
def test_relu_closes_slots_and_keeps_their_index(relu):
    x, W, b = coder(5, 8, 60)
    b = b - 6
    values, indices = launch_encode_topk(x, W, b, 20, relu=relu)
    check_exact((values, indices), x, W, b, 20, relu=relu)
    assert bool((values < 0).any()) is not relu


def test_a_row_whose_largest_sit_in_one_tile_falls_back():
    x, W, b = coder(4, 8, 600)
    b[130:150] += 50  # more than a tile emits
    check_exact(launch_encode_topk_certified(x, W, b, 12), x, W, b, 12)


def test_more_wanted_than_the_tiles_emit():
    x, W, b = coder(3, 8, 140)
    check_exact(launch_encode_topk_certified(x, W, b, 100), x, W, b, 100)


def test_groups_of_groups(monkeypatch):
    monkeypatch.setattr(select, "FLAT", 4)
    assert select.level_sizes(1200, 2) == [1200, 75, 5]
    x, W, b = coder(3, 8, 1200)
    check_exact(launch_encode_topk(x, W, b, 2), x, W, b, 2)


def test_chunks_of_rows_change_nothing():
    x, W, b = coder(140, 8, 30)
    whole = launch_encode_topk(x, W, b, 5)
    parts = launch_encode_topk(x, W, b, 5, scratch_bytes=1)
    for one, other in zip(whole, parts, strict=True):
        assert_same_bits(one, other)
    assert [rows.stop - rows.start for rows in row_chunks(300, 30, 1)] == [128, 128, 44]
    assert row_chunks(0, 30, 1) == []


@pytest.mark.parametrize("tiles", CONFIGS)
def test_the_same_bits_every_time_and_in_any_batch(tiles):
    x, W, b = coder(40, 24, 90, "normal")
    run = lambda rows: launch_encode_topk(rows, W, b, 6, config=CONFIGS[tiles])  # noqa: E731
    first = run(x)
    for one, other in zip(first, run(x), strict=True):
        assert_same_bits(one, other)
    for rows in (slice(0, 1), slice(17, 40)):
        for whole, alone in zip(first, run(x[rows]), strict=True):
            assert_same_bits(whole[rows], alone)


@pytest.mark.parametrize("way", WAYS)
def test_ten_runs_give_the_same_bits(way):
    x, W, b = coder(5, 24, 300, "normal", torch.bfloat16)
    first = WAYS[way](x, W, b, 6)
    for _ in range(9):
        for one, other in zip(first, WAYS[way](x, W, b, 6), strict=True):
            assert_same_bits(other, one)


def test_mixed_dtypes_are_computed_in_float32():
    x, W, b = coder(5, 16, 60)
    check_exact(launch_encode_topk(x.bfloat16(), W, b.half(), 4), x, W, b, 4)


def test_strided_operands():
    x, W, b = coder(6, 20, 60)
    wide = torch.zeros(6, 50)
    wide[:, 7:27] = x
    check_exact(launch_encode_topk(wide[:, 7:27], W.T.contiguous().T, b, 4), x, W, b, 4)


@pytest.mark.parametrize("tiles", ["pointers", "descriptors"])
def test_operands_and_scratch_beyond_2_to_the_31_elements(huge, overflow_checked, tiles):
    n, d, f, far = 5, 16, 6, 2**29
    x, W, b = coder(n, d, f)
    rows = huge((f + n) * far, dtype=torch.float32)
    far_W = rows.as_strided((f, d), (far, 1)).copy_(W)
    far_x = rows.as_strided((n, d), (far, 1), storage_offset=f * far).copy_(x)
    scratch = rows.as_strided((n, 16), (far, 1), storage_offset=64)
    chunk = launch_pre_activations(far_x, far_W, b, scratch=scratch, config=CONFIGS[tiles])
    expected = reference.pre_activations(x, W, b)
    assert_same_bits(chunk.z.contiguous(), expected)
    assert_same_bits(chunk.maxima.contiguous(), expected.max(1, keepdim=True).values)


def test_certified_operands_beyond_2_to_the_31_elements(huge, overflow_checked):
    n, d, f, far = 3, 16, 6, 2**29
    x, W, b = coder(n, d, f)
    rows = huge((f + n) * far, dtype=torch.float32)
    far_W = rows.as_strided((f, d), (far, 1)).copy_(W)
    far_x = rows.as_strided((n, d), (far, 1), storage_offset=f * far).copy_(x)
    check_exact(launch_encode_topk_certified(far_x, far_W, b, 2), x, W, b, 2)


@pytest.mark.parametrize("gemm", ["tile", "vendor"])
def test_group_maxima_of_shifted_values(gemm):
    x, W, b = coder(5, 8, 45)
    shift = draw("ties", 45, seed=3)
    chunk = launch_pre_activations(x, W, b, shift=shift, gemm=gemm)
    shifted = reference.pre_activations(x, W, b) - shift
    groups = torch.nn.functional.pad(shifted, (0, 3), value=float("-inf")).reshape(5, 3, 16)
    assert_same_bits(chunk.maxima.contiguous(), groups.max(-1).values)
