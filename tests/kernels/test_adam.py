"""Fused Adam against torch.optim.AdamW in float64 and in float32, and lazy rows against a loop over features."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fasttc.kernels._features import Terms, sort_entries
from fasttc.kernels._launch import config
from fasttc.kernels.adam import AdamStep, RowState, launch_adam
from fasttc.kernels.segment import launch_segment
from fasttc.ops import SparseActs
from fasttc.testing import assert_same_bits, assert_within_budget, draw, draw_acts, poison_empty

CUTTING = config(num_warps=1, num_stages=1, BLOCK_D=32, ROWS=2, CUT=3)
# Two specialisations of a kernel may fuse multiplications and additions differently on a GPU.
COMPILED_APART = {"rtol": 2e-6, "atol": 2e-6}
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}


def fresh(f: int, d: int, seed: int, **options) -> RowState:
    return RowState(draw("normal", f, d, seed=seed), torch.zeros(f, d), torch.zeros(f, d), **options)


def batch(
    step: int, n: int, k: int, f: int, d_out: int, d_in: int, pattern="uniform"
) -> tuple[SparseActs, Terms]:
    acts = draw_acts(n, k, f, pattern=pattern, seed=10 * step)
    left, right = draw("normal", n, d_out, seed=10 * step + 3), draw("normal", n, d_in, seed=10 * step + 4)
    return acts, Terms(acts.values, left, draw("normal", n, k, seed=10 * step + 5), right)


def gradients(acts: SparseActs, terms: Terms, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values, grads = (replace(acts, values=t.to(dtype)).to_dense() for t in (terms.values, terms.grads))
    return values.T @ terms.left.to(dtype), grads.T @ terms.right.to(dtype)


class Unfused:
    """AdamW on dense gradients, then rows of unit length."""

    def __init__(self, states: tuple[RowState, RowState], dtype: torch.dtype) -> None:
        self.weights = [torch.nn.Parameter(state.weight.to(dtype, copy=True)) for state in states]
        self.unit = [state.unit_norm for state in states]
        self.optimiser = torch.optim.AdamW(self.weights, **OPTIONS)

    @torch.no_grad()
    def step(self, grads: tuple[Tensor, Tensor]) -> None:
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = grad
        self.optimiser.step()
        for weight, unit in zip(self.weights, self.unit, strict=True):
            if unit:
                weight /= weight.norm(dim=1, keepdim=True)

    def tensors(self) -> list[Tensor]:
        state = self.optimiser.state
        return [t.detach() for w in self.weights for t in (w, state[w]["exp_avg"], state[w]["exp_avg_sq"])]


@pytest.mark.parametrize("cutting", [None, CUTTING], ids=["default", "cutting"])
@pytest.mark.parametrize("pattern", ["uniform", "one_feature", "few_features"])
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit-decoder"])
def test_equal_to_the_unfused_optimiser(unit_norm, pattern, cutting):
    f, d_out, d_in = 9, 40, 20
    dec, enc = fresh(f, d_out, 1, unit_norm=unit_norm), fresh(f, d_in, 2)
    double, single = (Unfused((dec, enc), dtype) for dtype in (torch.float64, torch.float32))
    for t in (1, 2, 3):
        acts, terms = batch(t, 7, 3, f, d_out, d_in, pattern)
        for unfused, dtype in ((double, torch.float64), (single, torch.float32)):
            unfused.step(gradients(acts, terms, dtype))
        with poison_empty():
            order = sort_entries(acts.indices, None, f)
            launch_adam(order, terms, AdamStep(t, **OPTIONS), dec=dec, enc=enc, config=cutting)
    got = (dec.weight, dec.m, dec.v, enc.weight, enc.m, enc.v)
    names = ("W_dec", "m of W_dec", "v of W_dec", "W_enc", "m of W_enc", "v of W_enc")
    for name, fused, exact, eager in zip(names, got, double.tensors(), single.tensors(), strict=True):
        assert_within_budget(fused, exact, eager, name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit"])
def test_the_shadow_is_the_rounded_weight(unit_norm, dtype):
    states = [
        fresh(7, d, 1, unit_norm=unit_norm, shadow=torch.full((7, d), torch.nan, dtype=dtype))
        for d in (40, 20)
    ]
    acts, terms = batch(1, 5, 2, 7, 40, 20)
    order = sort_entries(acts.indices, None, 7)
    launch_adam(order, terms, AdamStep(1, **OPTIONS), dec=states[0], enc=states[1], config=CUTTING)
    for state in states:
        assert_same_bits(state.shadow, state.weight.to(dtype))


def test_half_precision_activations():
    acts, terms = batch(1, 5, 2, 7, 40, 20)
    halves = replace(terms, left=terms.left.bfloat16(), right=terms.right.bfloat16())
    states = [(fresh(7, 40, 1), fresh(7, 20, 2)) for _ in range(2)]
    order = sort_entries(acts.indices, None, 7)
    step = AdamStep(1, **OPTIONS)
    launch_adam(order, halves, step, dec=states[0][0], enc=states[0][1], config=CUTTING)
    widened = replace(terms, left=halves.left.float(), right=halves.right.float())
    launch_adam(order, widened, step, dec=states[1][0], enc=states[1][1], config=CUTTING)
    for half, wide in zip(*states, strict=True):
        torch.testing.assert_close(half.weight, wide.weight, **COMPILED_APART)


def test_vectors_are_those_of_the_segment_sums():
    acts, terms = batch(1, 7, 3, 9, 40, 20, "one_feature")
    terms = replace(terms, thetas=draw("normal", 7, 3, seed=9))
    order = sort_entries(acts.indices, None, 9)
    sums = launch_segment(order, terms, config=CUTTING)
    fused = launch_adam(
        order, terms, AdamStep(1, 1e-3), dec=fresh(9, 40, 1), enc=fresh(9, 20, 2), config=CUTTING
    )
    for name in ("bias", "theta", "count"):
        torch.testing.assert_close(getattr(fused, name), getattr(sums, name), **COMPILED_APART)
    assert fused.dec is None
    assert fused.enc is None


@pytest.mark.parametrize("side", ["dec", "enc"])
def test_one_matrix_alone(side):
    acts, terms = batch(1, 5, 2, 7, 40, 20)
    alone = Terms(terms.values, terms.left) if side == "dec" else Terms(grads=terms.grads, right=terms.right)
    order = sort_entries(acts.indices, None, 7)
    both = {"dec": fresh(7, 40, 1), "enc": fresh(7, 20, 2)}
    launch_adam(order, terms, AdamStep(1, **OPTIONS), **both, config=CUTTING)
    one = fresh(7, 40, 1) if side == "dec" else fresh(7, 20, 2)
    launch_adam(order, alone, AdamStep(1, **OPTIONS), **{side: one}, config=CUTTING)
    torch.testing.assert_close(one.weight, both[side].weight, **COMPILED_APART)


def lazy_by_hand(state: RowState, last: list[int], grad: Tensor, used: Tensor, t: int) -> None:
    """The documented semantics of lazy rows, in float64, one row at a time."""
    for f in used.tolist():
        passed = t - last[f]
        state.m[f] = 0.9**passed * state.m[f] + 0.1 * grad[f]
        state.v[f] = 0.999**passed * state.v[f] + 0.001 * grad[f] ** 2
        state.weight[f] *= (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) ** passed
        denominator = (state.v[f] / (1 - 0.999**t)).sqrt() + OPTIONS["eps"]
        state.weight[f] -= OPTIONS["lr"] / (1 - 0.9**t) * state.m[f] / denominator
        last[f] = t


@pytest.mark.parametrize("f", [4, 30], ids=["by-feature", "by-entry"])
def test_lazy_rows(f):
    d_out, d_in, n = 40, 20, 4
    dec, enc, last_step = fresh(f, d_out, 1), fresh(f, d_in, 2), torch.zeros(f, dtype=torch.int32)
    oracles = [RowState(*(t.double() for t in (s.weight, s.m, s.v))) for s in (dec, enc)]
    lasts, initial = ([0] * f, [0] * f), dec.weight.clone()
    for t in (1, 2, 3, 4):
        acts, terms = batch(t, n, 1, f, d_out, d_in)
        used = acts.indices.unique()
        for oracle, last, grad in zip(oracles, lasts, gradients(acts, terms, torch.float64), strict=True):
            lazy_by_hand(oracle, last, grad, used, t)
        with poison_empty():
            order = sort_entries(acts.indices, None, f)
            sums = launch_adam(
                order, terms, AdamStep(t, **OPTIONS), dec=dec, enc=enc, last_step=last_step, config=CUTTING
            )
        assert sums.count.sum() == n
        assert last_step.tolist() == lasts[0]
    for got, oracle in zip((dec, enc), oracles, strict=True):
        for name in ("weight", "m", "v"):
            exact = getattr(oracle, name)
            assert_within_budget(
                getattr(got, name), exact, exact.float(), eps=8 * torch.finfo(torch.float32).eps
            )
    never = last_step == 0
    assert_same_bits(dec.weight[never], initial[never])
    assert f == 4 or bool(never.any())


def test_lazy_rows_touched_every_step_are_dense_rows():
    states = [(fresh(3, 40, 1), fresh(3, 20, 2)) for _ in range(2)]
    last_step = torch.zeros(3, dtype=torch.int32)
    for t in (1, 2):
        acts, terms = batch(t, 4, 3, 3, 40, 20)
        order = sort_entries(acts.indices, None, 3)
        for (dec, enc), last in zip(states, (None, last_step), strict=True):
            launch_adam(
                order, terms, AdamStep(t, **OPTIONS), dec=dec, enc=enc, last_step=last, config=CUTTING
            )
    for dense, lazy in zip(*states, strict=True):
        torch.testing.assert_close(lazy.weight, dense.weight, **COMPILED_APART)


def test_an_empty_batch_moves_dense_rows_by_their_momentum_and_lazy_rows_not_at_all():
    acts, terms = batch(1, 0, 3, 5, 40, 20)
    order = sort_entries(acts.indices, None, 5)
    dense, lazy = fresh(5, 40, 1), fresh(5, 40, 1)
    for state in (dense, lazy):
        state.m.fill_(1.0)
        state.v.fill_(1.0)
    before = lazy.weight.clone()
    alone = Terms(terms.values, terms.left)
    launch_adam(order, alone, AdamStep(7, 1e-2), dec=dense, config=CUTTING)
    launch_adam(
        order, alone, AdamStep(7, 1e-2), dec=lazy, last_step=torch.zeros(5, dtype=torch.int32), config=CUTTING
    )
    assert bool((dense.weight < before).all())
    assert_same_bits(lazy.weight, before)


@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
def test_ten_runs_give_the_same_bits(lazy):
    acts, terms = batch(1, 5, 2, 3, 40, 8, "one_feature")
    order = sort_entries(acts.indices, None, 3)
    found = []
    for _ in range(10):
        dec, enc = fresh(3, 40, 1, unit_norm=True), fresh(3, 8, 2)
        last_step = torch.zeros(3, dtype=torch.int32) if lazy else None
        launch_adam(
            order, terms, AdamStep(1, **OPTIONS), dec=dec, enc=enc, last_step=last_step, config=CUTTING
        )
        found.append([dec.weight, dec.m, dec.v, enc.weight, enc.m, enc.v])
    for again in found[1:]:
        for one, other in zip(found[0], again, strict=True):
            assert_same_bits(other, one)


def test_a_row_of_zeros_stays_finite_when_normalised():
    state = replace(fresh(2, 8, 1, unit_norm=True), weight=torch.zeros(2, 8))
    acts = SparseActs(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int32), 2, (1,))
    order = sort_entries(acts.indices, None, 2)
    launch_adam(order, Terms(acts.values, torch.ones(1, 8)), AdamStep(1, 1e-2), dec=state)
    assert_same_bits(state.weight, torch.zeros(2, 8))


@pytest.mark.parametrize(("given", "missing"), [("dec", "enc"), ("enc", "dec")])
def test_terms_without_their_weights_are_refused(given, missing):
    acts, terms = batch(1, 5, 2, 7, 40, 20)
    state = {given: fresh(7, 40 if given == "dec" else 20, 1)}
    with pytest.raises(
        ValueError, match=f"{missing}: expected the state of the matrix whose gradient is summed"
    ):
        launch_adam(sort_entries(acts.indices, None, 7), terms, AdamStep(1, 1e-2), **state)


def test_rows_beyond_2_to_the_31_elements(huge, overflow_checked):
    d = 4096
    f = 2**31 // d + 9
    weight, m, v = (huge(f, d, dtype=torch.float32) for _ in range(3))
    used = [1, f - 1]
    start = draw("normal", 2, d)
    weight[used], m[used], v[used] = start, torch.zeros(2, d), torch.zeros(2, d)
    indices = torch.tensor([[used[1]], [used[0]]], dtype=torch.int32)
    terms = Terms(torch.ones(2, 1), draw("normal", 2, d, seed=3))
    wide = config(2, 1, BLOCK_D=4096, ROWS=2, CUT=8)
    last_step = torch.zeros(f, dtype=torch.int32)
    launch_adam(
        sort_entries(indices, None, f),
        terms,
        AdamStep(1, **OPTIONS),
        dec=RowState(weight, m, v),
        last_step=last_step,
        config=wide,
    )
    unfused = Unfused((RowState(start, start, start), RowState(start, start, start)), torch.float64)
    grad = terms.left.double().flip(0)
    unfused.step((grad, grad))
    exact = unfused.tensors()[0]
    assert_within_budget(weight[used], exact, exact.float(), eps=4 * torch.finfo(torch.float32).eps)
