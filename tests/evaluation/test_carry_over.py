"""Verdicts on features whose fate is known, and sums against dense activations."""

import copy
import csv

import pytest
import torch

from fasttc.evaluation import carry_over
from fasttc.evaluation.carry_over import COLUMNS, summary, write_table
from fasttc.nn import TranscoderSet
from fasttc.training import TokenData
from fasttc.training.activations import activation_source


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", dtype=torch.float64)


@pytest.fixture
def data(documents):
    return TokenData(documents, context=24, bos_id=2, vocab_size=61, fractions=(0, 0, 1))


def changed(tcs: TranscoderSet, **changes) -> TranscoderSet:
    """A copy with ``parameter=function(tensor)`` applied in every layer."""
    copies = [copy.deepcopy(tc) for tc in tcs]
    with torch.no_grad():
        for tc in copies:
            for name, function in changes.items():
                function(tc.get_parameter(name))
    return TranscoderSet(copies, tcs.sites)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_figures_are_those_of_dense_activations(model, data, transcoders, activation):
    base = transcoders(model, activation)
    adapted = changed(base, W_enc=lambda w: w.add_(0.1 * torch.randn_like(w)), W_dec=lambda w: w[0].neg_())
    found = carry_over(model, base, adapted, data, batch_size=2)
    with activation_source(model, base.sites) as source:
        xs = zip(*(source.read(b)[0] for b in data.batches("test", 3)), strict=True)
        for layer, before, after, parts in zip(found, base, adapted, xs, strict=True):
            a, b = (tc.eval().encode(torch.cat(parts)).to_dense().detach() for tc in (before, after))
            torch.testing.assert_close(layer.base_rate, (a != 0).double().mean(0))
            torch.testing.assert_close(layer.adapted_rate, (b != 0).double().mean(0))
            for f in range(24):
                expected = torch.corrcoef(torch.stack([a[:, f], b[:, f]]))[0, 1]
                torch.testing.assert_close(layer.activation_correlation[f], expected, equal_nan=True)
            assert layer.decoder_cosine[0] == pytest.approx(-1)
            expected = torch.cosine_similarity(before.W_enc, after.W_enc, dim=1).detach()
            torch.testing.assert_close(layer.encoder_cosine, expected)


def test_verdicts(model, data, transcoders):
    base = changed(transcoders(model, "relu"), b_enc=lambda b: b[1].fill_(-1e6))

    def fate(b: torch.Tensor) -> None:
        b[1] = 5.0  # never fired, fires now
        b[2] = -1e6  # fires no more

    adapted = changed(base, b_enc=fate, W_dec=lambda w: w[3].neg_())
    for layer in carry_over(model, base, adapted, data):
        expected = ["newly used", "dead", "changed"]
        assert layer.verdicts[1:4] == expected
        assert layer.counts() == {"kept": 21, "changed": 1, "dead": 1, "newly used": 1}
    assert (
        all(set(layer.verdicts) == {"kept"} for layer in carry_over(model, adapted, adapted, data)) is False
    )
    line = summary(carry_over(model, base, adapted, data))[0]
    assert line["kept of used"] == pytest.approx(21 / 23)


def test_the_table_holds_every_feature(model, data, transcoders, tmp_path):
    tcs = transcoders(model)
    layers = carry_over(model, tcs, tcs, data)
    write_table(layers, tmp_path / "features.csv")
    with (tmp_path / "features.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(int(r["layer"]), int(r["feature"])) for r in rows] == [
        (i, f) for i in range(3) for f in range(24)
    ]
    assert {r["verdict"] for r in rows} <= {"kept", "dead"}
    assert float(rows[5]["base_rate"]) == float(rows[5]["adapted_rate"])


def test_bad_input(model, data, transcoders):
    tcs = transcoders(model)
    part = TranscoderSet(list(tcs)[:2], tcs.sites[:2])
    with pytest.raises(ValueError, match=r"base: expected transcoders of layers \[0, 1, 2\], got \[0, 1\]"):
        carry_over(model, part, tcs, data)
    with pytest.raises(ValueError, match=r"least: expected a number in \(0, 1\], got 0"):
        carry_over(model, tcs, tcs, data, least=0)
    with pytest.raises(ValueError, match="expected documents of at least two tokens"):
        carry_over(model, tcs, tcs, TokenData([[5], [6], [7]], context=8, fractions=(0, 0, 1)))
