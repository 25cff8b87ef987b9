"""Rank correlation, and which features the summary counts."""

import math

import pytest
import torch

from fasttc.benchmarks.attribution import interventions


def test_spearman_with_ties() -> None:
    one, other = torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([10.0, 30.0, 20.0, 40.0])
    assert interventions.ranks(one).tolist() == [0, 1.5, 1.5, 3]
    assert interventions.spearman(one, one) == pytest.approx(1)
    assert interventions.spearman(one, -one) == pytest.approx(-1)
    assert interventions.spearman(one, other) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(interventions.spearman(one, torch.ones(4)))


def test_features_that_reach_nothing_are_left_out_of_one_line() -> None:
    rows = [
        {"influence": a, "activation": b, "written": b, "kl": c}
        for a, b, c in ((0.0, 9.0, 0.0), (1.0, 1.0, 2.0), (2.0, 2.0, 1.0))
    ]
    found = interventions.summary({"random": [rows], "top": [rows]})
    assert found["random"]["influence"]["pooled"] == pytest.approx(0.5)
    assert found["reaching"]["influence"]["pooled"] == pytest.approx(-1)
