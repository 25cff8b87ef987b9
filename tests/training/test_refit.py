"""The closed form against its definition in dense float64, and what it does for a training."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttc.nn import Transcoder
from fasttc.ops import SparseActs
from fasttc.training import Interrupted, adapt, finetune_ffn, train
from fasttc.training.closed_form import Refits, refit_last
from fasttc.training.gram import Gram, padded
from fasttc.training.refit import CG_TOLERANCE, LEAST_UNIT, Decoder, DecoderSums, conjugate_gradients, refit

QUICK = {"batch_size": 8, "progress": False, "validation_tokens": 1000}
RIDGES = (30.0, 1.0)


def problem(activation: str = "topk", skip: bool = False, n: int = 301) -> tuple[Transcoder, Tensor, Tensor]:
    k = 4 if activation == "topk" else None
    tc = Transcoder(12, 40, 9, activation, k=k, skip=skip, dtype=torch.float64)
    with torch.no_grad():
        tc.b_enc[3] = -1e6  # a feature that never fires
        tc.b_dec.normal_()
        if tc.W_skip is not None:
            tc.W_skip.normal_()
    return tc, torch.randn(n, 12, dtype=torch.float64), torch.randn(n, 9, dtype=torch.float64)


def added(tc: Transcoder, x: Tensor, y: Tensor, dense_features: int = 40) -> DecoderSums:
    sums = DecoderSums(tc, dense_features=dense_features)
    for a, b in zip(x.split(70), y.split(70), strict=True):
        sums.add(tc.encode(a), a, b)
    return sums


@pytest.mark.parametrize("dense_features", [40, 39], ids=["whole", "pairs"])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("activation", ["topk", "jumprelu", "relu"])
def test_solutions_satisfy_the_normal_equations(activation, skip, dense_features):
    """``(Z_c^T Z_c + λ)(W - W0) = Z_c^T (Y_c - Z_c W0)``, to the tolerance of the solver."""
    tc, x, y = problem(activation, skip)
    Z, old = tc.encode(x).to_dense().detach(), tc.W_dec.detach()
    if tc.W_skip is not None:
        Z, old = torch.cat([Z, x], 1), torch.cat([old, tc.W_skip.T.detach()])
    square = Z.square().sum(0) / (Z != 0).sum(0).clamp(min=1)
    assert square[3] == 0
    usual = square[square > 0].mean()
    unit = square.where(square > 0, usual).clamp(min=LEAST_UNIT * usual)
    centred, target = Z - Z.mean(0), y - y.mean(0)
    wanted = centred.T @ (target - centred @ old)
    solver = 1e3 * torch.finfo(torch.float64).eps if dense_features == 40 else CG_TOLERANCE
    for ridge, found in added(tc, x, y, dense_features).solutions(tc, RIDGES):
        W = found.W_dec if found.W_skip is None else torch.cat([found.W_dec, found.W_skip.T])
        residual = (centred.T @ centred + (ridge * unit).diag()) @ (W - old) - wanted
        assert (residual.norm(dim=0) <= 2 * solver * wanted.norm(dim=0)).all()
        assert torch.equal(W[3], old[3])
        torch.testing.assert_close(found.b_dec, y.mean(0) - Z.mean(0) @ W)


@pytest.mark.parametrize("layout", ["padded", "csr", "empty", "nothing active"])
@pytest.mark.parametrize(("dense_features", "dense_products"), [(50, 0), (1, 0), (1, 50)])
def test_gram_is_the_matrix_of_second_moments(layout, dense_features, dense_products, monkeypatch):
    monkeypatch.setattr("fasttc.training.gram.DENSE_PRODUCT_FEATURES", dense_products)
    monkeypatch.setattr(
        "fasttc.training.gram.PAIRS_AT_ONCE", 7
    )  # every block is cut, pairs merge again and again
    A = torch.zeros(31, 50, dtype=torch.float64)
    if layout in ("padded", "csr"):
        A = torch.randn(31, 50, dtype=torch.float64).relu() * (torch.rand(31, 50) < 0.2)
    gram = Gram(50, A.device, dense_features=dense_features)
    for rows in A[: 0 if layout == "empty" else 31].split(10):
        gram.add(codes(rows, padded_rows=layout == "padded"))
    expected = A.T @ A
    eps = torch.finfo(torch.float64 if dense_features == 50 else torch.float32).eps
    error = gram.product()(torch.eye(50, dtype=torch.float64)) - expected
    assert (error.abs() <= 31 * eps * (A.abs().T @ A.abs())).all()
    torch.testing.assert_close(gram.diagonal(), expected.diagonal())
    again = Gram(50, A.device, dense_features=dense_features)
    again.restore(gram.state())
    assert torch.equal(again.diagonal(), gram.diagonal())
    if dense_features == 1:
        with pytest.raises(ValueError, match="expected a Gram matrix held whole, got 50 features as pairs"):
            gram.dense()


def test_a_few_tiny_codes_do_not_make_a_huge_row():
    """|change| <= |residual| / (2 sqrt(ridge LEAST_UNIT m)), whatever the code: here 1e-4, with m about 1."""
    tc = Transcoder(2, 2, 1, "relu", dtype=torch.float64)
    with torch.no_grad():
        for parameter in tc.parameters():
            parameter.zero_()
        tc.W_enc.copy_(torch.eye(2))
    x = torch.zeros(200, 2, dtype=torch.float64)
    x[:, 0] = torch.rand(200, dtype=torch.float64) + 0.5
    x[7, 1] = 1e-4
    y = torch.zeros(200, 1, dtype=torch.float64)
    y[7] = 1.0
    usual = float((x[:, 0].square().mean() + 1e-8) / 2)
    for ridge, found in added(tc, x, y).solutions(tc, (1.0,)):
        assert abs(float(found.W_dec[1])) <= 1 / (2 * math.sqrt(ridge * LEAST_UNIT * usual))


def codes(A: Tensor, padded_rows: bool) -> SparseActs:
    everything = torch.arange(50, dtype=torch.int32).expand(len(A), 50)
    acts = SparseActs(A.clone(), everything.clone(), 50, (len(A),))
    return acts if padded_rows else acts.to_csr()


def test_padding_keeps_pairs_in_the_upper_triangle():
    acts = SparseActs(
        torch.tensor([2.0, 3.0, 5.0]), torch.tensor([1, 4, 2]).int(), 6, (3,), torch.tensor([0, 2, 2, 3])
    )
    values, indices = padded(acts)
    assert values.tolist() == [[2, 3], [0, 0], [5, 0]]
    assert indices.tolist() == [[1, 4], [5, 5], [2, 5]]


def test_conjugate_gradients_on_a_hard_spectrum():
    basis = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64)).Q
    matrix = basis @ torch.logspace(-2, 2, 60, dtype=torch.float64).diag() @ basis.T
    b, penalty = torch.randn(60, 3, dtype=torch.float64), torch.full((60,), 1e-1, dtype=torch.float64)
    b[:, 2] = 0
    found = conjugate_gradients(matrix.matmul, matrix.diagonal(), penalty, b, torch.zeros_like(b))
    residual = (matrix + penalty.diag()) @ found - b
    assert (residual.norm(dim=0) <= 2 * CG_TOLERANCE * b.norm(dim=0)).all()


def test_a_planted_decoder_is_found_and_a_better_one_kept():
    tc, x, _ = problem(n=2000)
    truth = torch.randn(40, 9, dtype=torch.float64)
    y = tc.encode(x).to_dense().detach() @ truth + 3.0
    sums = added(tc, x, y)
    assert refit(tc, sums, x[:300], y[:300], ridges=(1e3, 1e-3)) == 1e-3
    assert ((tc(x) - y).square().sum() / (y - y.mean(0)).square().sum()).item() < 1e-4
    noise = torch.randn_like(y)
    best = tc.W_dec.detach().clone()
    assert refit(tc, added(tc, x[:50], noise[:50]), x[:300], y[:300]) is None
    assert torch.equal(tc.W_dec, best)


@pytest.fixture
def pair(model, data):
    base, _ = train(model, data, n_features=64, k=8, tokens=8000, **QUICK)
    return base, finetune_ffn(model, data, tokens=4000, lr=3e-3, **QUICK)


def test_closed_form_alone_beats_no_adaptation_and_moves_decoders_only(pair, data):
    base, tuned = pair
    found, report = adapt(tuned, base, data, tokens=3000, refit="only", **QUICK)
    assert report.fvu < 0.8 * report.to_dict()["fvu_before"]
    assert report.steps == 0
    assert 3000 <= report.tokens == report.refits["tokens"] < 3000 + 8 * 16
    for new, old in zip(found, base, strict=True):
        assert torch.equal(new.W_enc, old.W_enc)
        assert not torch.equal(new.W_dec, old.W_dec)


def test_a_closed_form_alone_has_no_checkpoint_and_is_made_again(pair, data, tmp_path, same_tensors):
    base, tuned = pair
    options = QUICK | {"tokens": 1000, "refit": "only"}
    one, two = (
        adapt(tuned, base, data, out=tmp_path / "a", resume=resume, **options)[0] for resume in (False, True)
    )
    for first, second in zip(one, two, strict=True):
        same_tensors(dict(first.state_dict()), dict(second.state_dict()))


@pytest.mark.parametrize("refit", ["first", "last", "both"])
def test_refits_are_in_the_budget_and_never_hurt_on_validation(pair, data, refit):
    base, tuned = pair
    _, report = adapt(tuned, base, data, tokens=4000, refit=refit, refit_tokens=None, **QUICK)
    assert abs(report.tokens - 4000) <= 2 * 8 * 16
    assert (report.refits["tokens"] > 0) == (refit != "last")
    assert bool(report.refits["first"]) == (refit != "last")
    assert bool(report.refits["last"]) == (refit != "first")
    assert report.fvu < report.to_dict()["fvu_before"]


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_scratch_has_the_same_refits(model, data, activation):
    plain = train(model, data, n_features=64, k=8, tokens=4000, activation=activation, **QUICK)[1]
    last = train(model, data, n_features=64, k=8, tokens=4000, activation=activation, refit="last", **QUICK)[
        1
    ]
    assert last.tokens == plain.tokens
    assert last.fvu < plain.fvu
    assert math.isfinite(last.l0)


def test_a_run_with_refits_resumes_to_the_same_bits(pair, data, tmp_path, interrupt, same_tensors):
    base, tuned = pair
    options = QUICK | {"tokens": 4000, "refit": "both"}
    whole, report = adapt(tuned, base, data, **options)
    with pytest.raises(Interrupted):
        adapt(tuned, base, data, out=tmp_path / "a", callbacks=[interrupt(report.steps - 3)], **options)
    resumed, again = adapt(tuned, base, data, out=tmp_path / "a", resume=True, **options)
    for one, two in zip(whole, resumed, strict=True):
        same_tensors(dict(one.state_dict()), dict(two.state_dict()))
    assert again.refits == report.refits


@pytest.mark.parametrize("broken", [0, 1])
def test_a_layer_that_diverged_keeps_its_decoder_and_the_other_is_refitted(broken):
    tc, x, y = problem()
    layers = [tc, problem()[0]]
    before = layers[broken].W_dec.clone()
    sums = [added(layer, x, y) for layer in layers]
    sums[broken].add(layers[broken].encode(x), x, torch.full_like(y, math.inf))
    task: Any = SimpleNamespace(transcoders=layers, sums=sums)
    found = Refits()
    refit_last(task, ([x, x], [y, y]), found)
    assert found.last[broken] is None
    assert found.last[1 - broken] is not None
    assert torch.equal(layers[broken].W_dec, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refit": "always"}, "refit: expected one of auto, first, last, both, only or None, got 'always'"),
        (
            {"refit": "last", "refit_tokens": 10},
            "refit_tokens: expected refit='first' or 'both' with it, got 'last'",
        ),
        (
            {"refit": "both", "refit_tokens": 4000, "tokens": 4000},
            "refit_tokens: expected fewer than tokens = 4000",
        ),
        ({"refit": "last", "train": ("W_enc",)}, "refit: expected W_dec and b_dec among train, got W_enc"),
    ],
)
def test_bad_options(model, data, options, message):
    base, _ = train(model, data, n_features=64, k=8, tokens=200, layers=(0,), **QUICK)
    with pytest.raises(ValueError, match=message):
        adapt(model, base, data, **options)


def test_weaker_ridges_are_not_tried_once_one_is_worse():
    tc, x, _ = problem(n=400)
    y, right = tc(x).detach(), tc.W_dec.detach().clone()
    tried: list[float] = []

    class Planned:
        """Decoders that get better, then worse, then perfect."""

        def solutions(
            self, transcoder: Transcoder, ridges: tuple[float, ...]
        ) -> Iterator[tuple[float, Decoder]]:
            for ridge, off in zip(ridges, (0.2, 0.1, 0.15, 0.0), strict=True):
                tried.append(ridge)
                yield ridge, Decoder(right * (1 + off), transcoder.b_dec.detach(), None)

    with torch.no_grad():
        tc.W_dec.mul_(2)
    assert refit(tc, Planned(), x, y, ridges=(8.0, 4.0, 2.0, 1.0)) == 4.0
    assert tried == [8.0, 4.0, 2.0]
    torch.testing.assert_close(tc.W_dec.detach(), right * 1.1)
