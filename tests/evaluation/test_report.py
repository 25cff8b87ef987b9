"""The report as data and as a table; the metrics that need no model."""

import json
import math

import pytest
import torch

from fasttc.evaluation import FeatureReport, LayerReport, Report
from fasttc.evaluation.metrics import FeatureStatistics, Prediction, recovered
from fasttc.nn import Transcoder


def report(**changes) -> Report:
    layers = (
        LayerReport(0, 0.25, 1.5, 12.25, 1024, 3, 17, 3.5, 4.5, 0.75),
        LayerReport(1, math.nan, 12345.678, 9.0, 1024, 0, 2),
    )
    numbers = {
        "tokens": 12000, "predictions": 11900, "fvu": 0.25, "l0": 10.6, "kl": 0.125, "top1_error": 0.1,
        "ce_original": 3.25, "ce_replaced": 3.75, "ce_ablated": 8.25, "recovered": 0.9,
    }  # fmt: skip
    features = (FeatureReport(torch.zeros(3)),) * 2
    return Report(layers=layers, settings={"split": "test"}, features=features, **{**numbers, **changes})


def test_to_dict_is_json_without_nan():
    content = report(recovered=math.inf).to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["layers"][1]["fvu"] is None
    assert content["recovered"] is None
    assert content["layers"][0]["ce_replaced"] == 3.5
    assert "features" not in content


def test_table():
    lines = str(report(hints=("look",))).splitlines()
    assert lines == [
        "12,000 tokens, 11,900 predictions, 2 layers",
        "FVU 0.2500   L0 10.6   KL 0.1250   top-1 error 10.00 %",
        "CE original 3.2500   replaced 3.7500   ablated 8.2500   recovered 0.9000",
        "",
        "layer     FVU       MSE     L0   dead dense CE repl.  CE abl.  recov.",
        "    0  0.2500       1.5   12.2      3    17   3.5000   4.5000  0.7500",
        "    1     nan 1.235e+04    9.0      0     2        -        -       -",
        "hint: look",
    ]


def test_recovered():
    assert recovered(2.0, 3.0, 6.0) == 0.75
    assert recovered(2.0, 2.0, 6.0) == 1.0
    assert math.isnan(recovered(2.0, 2.0, 2.0))


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_prediction_by_hand(rows_at_once):
    final = torch.randn(11, 5, dtype=torch.float64)
    original = final + 0.3 * torch.randn(11, 5, dtype=torch.float64)
    head = torch.randn(7, 5, dtype=torch.float64)
    labels = torch.arange(11) % 7
    prediction = Prediction()
    for part in (slice(0, 6), slice(6, 11)):
        prediction.add(
            lambda h: h @ head.T, final[part], labels[part], original[part], rows_at_once=rows_at_once
        )
    p, q = ((h @ head.T).softmax(-1) for h in (final, original))
    assert prediction.count == 11
    assert prediction.ce == pytest.approx(-float(p[torch.arange(11), labels].log().sum()), rel=1e-12)
    assert prediction.kl == pytest.approx(float((q * (q / p).log()).sum()), rel=1e-12)
    assert prediction.top1 == int((p.argmax(-1) != q.argmax(-1)).sum())
    assert prediction.mean(22.0) == 2.0
    assert math.isnan(Prediction().mean(0.0))


def test_fvu_is_exact_where_the_mean_is_large():
    """sum ||y||^2 - n ||mean||^2 in float32 would lose everything here."""
    tc = Transcoder(4, 8, 3, k=2)
    x, y = torch.randn(100, 4), 1e4 + torch.randn(100, 3)
    statistics = FeatureStatistics(tc)
    for start in range(0, 100, 30):
        statistics.add(x[start : start + 30], y[start : start + 30])
    with torch.no_grad():
        got = tc(x)
    exact = (got.double() - y.double()).square().sum() / (y.double() - y.double().mean(0)).square().sum()
    assert statistics.result(0).fvu == pytest.approx(float(exact), rel=1e-6)
    rates = statistics.firing_rates()
    assert rates.dtype == torch.float64
    assert float(rates.sum()) == pytest.approx(statistics.result(0).l0, rel=1e-12)
