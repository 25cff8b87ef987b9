"""Exact selection of the k first of a row by (value, lower index), and the radix selection over a whole batch."""

import pytest
import torch

from fasttc.kernels import radix, select
from fasttc.kernels._lang import key_value, order_key, rounded
from fasttc.kernels._launch import config
from fasttc.ops import reference
from fasttc.testing import assert_same_bits, draw

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [  # rows, columns, k
    pytest.param(1, 1, 1, id="one-of-each"),
    pytest.param(7, 13, 5, id="primes"),
    pytest.param(3, 97, 97, id="k=F"),
    pytest.param(17, 263, 15, id="more-rows-than-a-block"),
    pytest.param(2, 17000, 3, id="three-levels"),
    pytest.param(0, 40, 4, id="no-rows"),
]


def check_topk(z, k, **options):
    values, indices = select.select_topk(z, k, **options)
    expected, at = reference.topk(z + options.get("bias", torch.zeros(1)), k, options.get("relu", False))
    assert_same_bits(indices, at, name="indices")
    assert_same_bits(values, expected, name="values")


@pytest.mark.parametrize("kind", ["normal", "ties", "all_equal"])
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_the_first_k_of_a_row(rows, n, k, kind):
    check_topk(draw(kind, rows, n), k)


def test_one_row_per_program(monkeypatch):
    monkeypatch.setattr(select, "interpreting", lambda: False)  # the blocks of a GPU
    check_topk(draw("ties", 3, 1100), 20)


def test_relu_and_bias():
    z, bias = draw("ties", 5, 300), draw("ties", 300, seed=1)
    check_topk(z, 150, relu=True)
    check_topk(z, 150, bias=bias)


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_rows_that_registers_do_not_hold(monkeypatch, kind):
    monkeypatch.setattr(select, "IN_REGISTERS", 64)
    monkeypatch.setattr(select, "_LONG", select.config_table(config(8, 1, BLOCK_R=4, BLOCK=64)))
    check_topk(draw(kind, 3, 1100), 9)
    check_topk(draw(kind, 3, 150), 150)


def test_special_values_are_ordered():
    row = [float("-inf"), 0.0, -0.0, 1e-45, -1e-45, float("inf"), 3.0, -3.0, float("nan"), 3.0]
    z = torch.tensor([row])
    values, indices = select.select_topk(z, 4)
    assert indices.tolist() == [[5, 6, 8, 9]]  # NaN before infinity, as torch.sort has it, then both threes
    assert values[0, 2].isnan()
    values, indices = select.select_topk(z[:, :5], 3)
    assert indices.tolist() == [[1, 2, 3]]  # +0 and -0 are equal: the lower index first
    assert_same_bits(values, torch.tensor([[0.0, 0.0, 1e-45]]))


def test_a_row_that_is_all_minus_infinity_still_selects_real_columns():
    z = torch.full((2, 37), float("-inf"))
    _, indices = select.select_topk(z, 37)
    assert indices.tolist() == [list(range(37))] * 2


def test_rows_beyond_2_to_the_31_elements(huge, overflow_checked):
    rows, n = 5, 40
    far = huge(5 * 2**29, dtype=torch.float32).as_strided((rows, n), (2**29, 1))
    far.copy_(draw("ties", rows, n))
    check_topk(far, 7)
    maxima = select.launch_group_max(far, n)
    grouped = torch.nn.functional.pad(far, (0, 8), value=float("-inf")).reshape(rows, 3, 16)
    assert_same_bits(maxima.contiguous(), grouped.max(-1).values)


@pytest.mark.parametrize("kind", ["normal", "ties", "heavy_tailed"])
def test_the_kth_key_of_many(kind):
    values = draw(kind, 5003)
    ordered = values.sort(descending=True).values
    for k in (1, 2, 2500, 5003):
        key = radix.kth_key(values, k)
        bits = int((ordered[k - 1] + 0.0).view(torch.int32))
        assert int(key) == (bits ^ 0x7FFFFFFF if bits < 0 else bits)
    assert int(radix.kth_key(values, torch.tensor(7))) == int(radix.kth_key(values, 7))


def test_keys_compare_like_values_and_rounding_is_to_nearest_even():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, keys, back, half, N: tl.constexpr):
        at = tl.arange(0, N)
        value = tl.load(x + at)
        key = order_key(value)
        tl.store(keys + at, key)
        tl.store(back + at, key_value(key))
        tl.store(half + at, rounded(value, tl.bfloat16))

    x = torch.cat([draw("heavy_tailed", 1020), torch.tensor([0.0, -0.0, float("inf"), float("-inf")])])
    keys, back, half = torch.empty(1024, dtype=torch.int32), torch.empty(1024), torch.empty(1024).bfloat16()
    kernel[(1,)](x, keys, back, half, 1024)
    assert_same_bits(back, x + 0.0)
    assert_same_bits(half, x.bfloat16())
    assert torch.equal(keys[:, None] < keys[None, :], x[:, None] < x[None, :])
