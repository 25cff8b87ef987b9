"""Sums per feature, against dense products in float64: both gradients, biases, thresholds and counts in one pass."""

from dataclasses import astuple, replace

import pytest
import torch
from torch import Tensor

from fasttc.kernels._features import FeatureSums, Terms, sort_entries
from fasttc.kernels._launch import config
from fasttc.kernels.segment import launch_segment
from fasttc.ops import SparseActs
from fasttc.testing import PATTERNS, assert_same_bits, assert_within_budget, draw, draw_acts, poison_empty

SHAPES = [  # N, K, F, D_out, D_in
    pytest.param((1, 1, 1, 1, 1), id="one-of-each"),
    pytest.param((7, 3, 13, 37, 5), id="primes"),
    pytest.param((3, 5, 5, 8, 33), id="K=F"),
    pytest.param((0, 2, 5, 8, 8), id="empty-batch"),
    pytest.param((5, 3, 7, 520, 513), id="odd-of-blocks"),
]
LAYOUTS = pytest.mark.parametrize("csr", [False, True], ids=["padded", "csr"])
# Two specialisations of a kernel may fuse multiplications and additions differently on a GPU.
COMPILED_APART = {"rtol": 2e-6, "atol": 2e-6}
# Runs of more than 3 entries are long, blocks of 2 do not divide the pieces, and 32 columns make several slices.
CUTTING = config(num_warps=1, num_stages=1, BLOCK_D=32, ROWS=2, CUT=3)


def problem(shape, csr=False, pattern="uniform", dtype=torch.float32) -> tuple[SparseActs, Terms]:
    n, k, f, d_out, d_in = shape
    acts = draw_acts(n, k, f, csr=csr, pattern=pattern)
    grads, thetas = (draw("normal", *acts.values.shape, seed=seed) for seed in (3, 4))
    left, right = (
        draw("normal", n, d_out, dtype=dtype, seed=5),
        draw("heavy_tailed", n, d_in, dtype=dtype, seed=6),
    )
    return acts, Terms(acts.values, left, grads, right, thetas)


def run(acts: SparseActs, terms: Terms, **options) -> FeatureSums:
    with poison_empty():
        return launch_segment(sort_entries(acts.indices, acts.row_ptr, acts.n_features), terms, **options)


def dense(acts: SparseActs, terms: Terms, dtype: torch.dtype, absolute: bool = False) -> list[Tensor]:
    """The five sums by dense products."""

    def spread(values: Tensor) -> Tensor:
        values = values.to(dtype)
        return replace(acts, values=values.abs() if absolute else values).to_dense()

    def rows(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).abs() if absolute else tensor.to(dtype)

    values, grads, thetas = (spread(t) for t in (terms.values, terms.grads, terms.thetas))
    counts = replace(acts, values=(terms.values != 0).to(dtype)).to_dense().sum(0)
    return [values.T @ rows(terms.left), grads.T @ rows(terms.right), grads.sum(0), thetas.sum(0), counts]


def check(sums: FeatureSums, acts: SparseActs, terms: Terms) -> None:
    oracle, eager, size = (dense(acts, terms, torch.float64), dense(acts, terms, torch.float32),
                           dense(acts, terms, torch.float64, absolute=True))  # fmt: skip
    for name, got, exact, single, terms_size in zip(
        ("dec", "enc", "bias", "theta"), astuple(sums)[:4], oracle, eager, size, strict=False
    ):
        largest = float(terms_size.max()) if terms_size.numel() else 0.0
        assert_within_budget(got, exact, single.to(got.dtype), magnitude=largest, name=name)
    assert sums.count.tolist() == oracle[4].tolist()


@LAYOUTS
@pytest.mark.parametrize("cutting", [None, CUTTING], ids=["default", "cutting"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle(shape, cutting, csr):
    if cutting is not None and shape[3] > 500:
        shape = (5, 3, 7, 40, 70)
    acts, terms = problem(shape, csr)
    check(run(acts, terms, config=cutting), acts, terms)


@LAYOUTS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_indices(pattern, csr):
    acts, terms = problem((11, 5, 16, 20, 9), csr, pattern)
    check(run(acts, terms, config=CUTTING), acts, terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_and_gradients(dtype):
    acts, terms = problem((7, 3, 9, 20, 17), dtype=dtype)
    check(run(acts, terms, dec_dtype=dtype, enc_dtype=dtype), acts, terms)


def test_one_sum_alone():
    acts, terms = problem((7, 3, 9, 20, 17))
    whole = run(acts, terms)
    only_dec = run(acts, Terms(values=terms.values, left=terms.left))
    torch.testing.assert_close(only_dec.dec, whole.dec, **COMPILED_APART)
    assert (only_dec.enc, only_dec.bias, only_dec.theta) == (None, None, None)
    only_enc = run(acts, Terms(grads=terms.grads, right=terms.right))
    torch.testing.assert_close(only_enc.enc, whole.enc, **COMPILED_APART)
    assert (only_enc.dec, only_enc.count) == (None, None)
    torch.testing.assert_close(run(acts, Terms(thetas=terms.thetas)).theta, whole.theta, **COMPILED_APART)


@pytest.mark.parametrize("missing", ["left", "right"])
def test_a_weight_without_rows_is_refused(missing):
    _, terms = problem((2, 1, 3, 4, 5))
    with pytest.raises(ValueError, match="expected values with left, and grads with right"):
        replace(terms, **{missing: None})


@LAYOUTS
def test_one_feature_hit_by_every_token_is_cut_and_summed_alike(csr):
    acts, terms = problem((23, 2, 6, 10, 10), csr, "one_feature")
    check(run(acts, terms, config=CUTTING), acts, terms)
    others = run(acts, terms, config=config(num_warps=1, num_stages=1, BLOCK_D=16, ROWS=4, CUT=64))
    check(others, acts, terms)


def test_counts_leave_out_zeros():
    indices = torch.tensor([[0, 2], [2, 3], [0, 2]], dtype=torch.int32)
    values = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]])
    acts = SparseActs(values, indices, 5, (3,))
    assert run(acts, Terms(values, draw("normal", 3, 4))).count.tolist() == [1, 0, 2, 0, 0]


@pytest.mark.parametrize("f", [6, 40], ids=["by-feature", "by-entry"])
def test_adding_to_a_gradient_touches_only_features_with_entries(f):
    acts, terms = problem((4, 3, f, 12, 40))
    fresh = run(acts, terms, config=CUTTING)
    before = draw("normal", f, 12, seed=8), draw("normal", f, 40, seed=9)
    added = tuple(t.clone() for t in before)
    used = torch.zeros(f, dtype=torch.bool)
    used[acts.indices.flatten().long()] = True
    for t in added:
        t[~used] = torch.nan
    sums = run(acts, terms, add_to=added, config=CUTTING)
    assert sums.dec is added[0]
    assert sums.enc is added[1]
    for got, old, new in zip(added, before, (fresh.dec, fresh.enc), strict=True):
        torch.testing.assert_close(got[used], (old + new)[used], **COMPILED_APART)
        assert bool(got[~used].isnan().all())
    torch.testing.assert_close(sums.bias, fresh.bias, **COMPILED_APART)
    assert sums.count.tolist() == fresh.count.tolist()


@LAYOUTS
def test_the_same_bits_every_time(csr):
    acts, terms = problem((8, 3, 5, 20, 40), csr)
    first = run(acts, terms, config=CUTTING)
    for _ in range(9):
        for got, before in zip(astuple(run(acts, terms, config=CUTTING)), astuple(first), strict=True):
            assert_same_bits(got, before)


def test_a_feature_does_not_depend_on_the_others():
    acts, terms = problem((12, 2, 4, 20, 9), pattern="one_feature")
    first = run(acts, terms, config=CUTTING)
    kept = acts.indices == 2
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    alone = SparseActs(acts.values[kept], acts.indices[kept], 4, (12,), row_ptr)
    own = replace(terms, values=alone.values, grads=terms.grads[kept], thetas=terms.thetas[kept])
    for got, before in zip(astuple(run(alone, own, config=CUTTING)), astuple(first), strict=True):
        assert_same_bits(got[2], before[2])


def test_tokens_and_features_beyond_2_to_the_31_elements(huge, overflow_checked):
    d = 4096
    rows = huge(2**31 // d + 9, d, dtype=torch.float16)
    n = rows.shape[0]
    tokens, features = [3, n - 4, n - 1], torch.tensor([n - 2, 1, n - 2], dtype=torch.int32)
    rows[tokens] = draw("normal", 3, d, dtype=torch.float16, seed=3)
    row_ptr = torch.zeros(n + 1, dtype=torch.int64)
    for token in tokens:
        row_ptr[token + 1 :] += 1
    values = draw("normal", 3, seed=4)
    into = huge(n, d, dtype=torch.float16)
    into[[1, n - 2]] = 0
    order = sort_entries(features, row_ptr, n)
    launch_segment(
        order, Terms(values, rows), add_to=(into, None), config=config(2, 1, BLOCK_D=4096, ROWS=2, CUT=8)
    )
    exact = values.double()[:, None] * rows[tokens].double()
    for feature, oracle in ((1, exact[1]), (n - 2, exact[0] + exact[2])):
        assert_within_budget(into[feature], oracle, oracle.half())
