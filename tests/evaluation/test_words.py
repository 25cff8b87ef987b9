"""Words and features: counting, first-order effects, controls that match, and when an effect counts."""

import copy
import math

import numpy as np
import pytest
import torch

from fasttc.evaluation import evaluate_adapters, recovery
from fasttc.evaluation.words import (
    FeatureTable,
    WordClass,
    WordEffect,
    ablation_effect,
    feature_table,
    matched_controls,
)
from fasttc.models import adapter_sites, hybrid
from fasttc.nn import AdapterSet, TranscoderAdapter
from fasttc.training.data import TokenData


@pytest.fixture
def pair(tiny_model):
    target = tiny_model("gemma2", dtype=torch.float64)
    base = copy.deepcopy(target)
    torch.manual_seed(3)
    for layer in base.model.layers:
        layer.mlp.down_proj.weight.data *= 1.3
    adapters = [TranscoderAdapter(32, 12, dtype=torch.float64).eval() for _ in range(3)]
    for adapter in adapters:
        # Small, so that first order is what counts; not so small that the float32 inside of norms drowns it.
        torch.nn.init.normal_(adapter.W_dec, std=1e-3)
    return target, base, AdapterSet(adapters, adapter_sites(target))


@pytest.fixture
def data(tiny_tokenizer) -> TokenData:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"t{i}" for i in rng.integers(4, 20, 12)) for _ in range(40)]
    return TokenData(texts, tiny_tokenizer, context=16, bos_id=2, vocab_size=61)


def test_rates_count_whole_words():
    words = WordClass(["wait", "hm."])
    assert words.rate(["Wait, waiting: WAIT hm. now", "a b c"]) == 1000 * 2 / 8
    assert words.rate([""]) == 0
    with pytest.raises(ValueError, match="words: expected at least one, none of them empty, got"):
        WordClass(["a", ""])


def test_effects_are_what_ablation_does_to_first_order(pair, data, tiny_tokenizer):
    target, base, adapters = pair
    words = WordClass(["t5", "t7"])
    batches = list(data.batches("train", 4))
    table = feature_table(target, base, adapters, batches, words, tiny_tokenizer)

    @torch.no_grad()
    def contrast(given) -> float:
        sums, counts = [0.0, 0.0], [0, 0]
        with hybrid(target, base, given):
            for batch in batches:
                log_p = target(**batch.model_inputs).logits.log_softmax(-1)
                inside = torch.isin(batch.labels, torch.tensor([5, 7]))
                for i, chosen in enumerate((inside, (batch.labels >= 0) & ~inside)):
                    sums[i] += float(log_p[chosen].gather(-1, batch.labels[chosen][:, None]).sum())
                    counts[i] += int(chosen.sum())
        return sums[0] / counts[0] - sums[1] / counts[1]

    whole = contrast(adapters)
    for feature in table.strongest(3):
        effect = table.effect[table.features.index(feature)]
        assert effect == pytest.approx(whole - contrast(adapters.ablated([feature])), rel=1e-2)
    assert (np.diff([table.effect[table.features.index(f)] for f in table.strongest(9)]) <= 0).all()
    with pytest.raises(ValueError, match="words: expected some of t60 in the text, found none"):
        feature_table(target, base, adapters, batches, WordClass(["t60"]), tiny_tokenizer)


def table_of(n: int) -> FeatureTable:
    rng = np.random.default_rng(1)
    return FeatureTable([(i % 3, i) for i in range(n)], rng.random(n), rng.random(n), rng.normal(size=n))


def test_controls_match_and_are_never_chosen():
    table = table_of(300)
    chosen = table.strongest(8)
    controls = matched_controls(table, chosen, 20)
    assert len(controls) == 20
    assert controls == matched_controls(table, chosen, 20)
    assert controls != matched_controls(table, chosen, 20, seed=1)
    place = {feature: i for i, feature in enumerate(table.features)}
    for control in controls:
        assert len(set(control)) == 8
        assert not set(control) & set(chosen)
        for column in (table.rate, table.strength):
            means = [np.log(column[[place[f] for f in features]]).mean() for features in (control, chosen)]
            assert abs(means[0] - means[1]) < 0.5 * np.log(column).std()


def test_controls_that_cannot_be():
    table = table_of(10)
    with pytest.raises(ValueError, match="controls: expected at least 6 other active features, got 4"):
        matched_controls(table, table.strongest(6))
    with pytest.raises(
        ValueError, match=r"chosen: expected features that are active on this text, got \[\(9, 9\)\]"
    ):
        matched_controls(table, [(9, 9)])


def test_an_effect_counts_beyond_the_95th_percentile():
    controls = [10.0 - i / 10 for i in range(20)]
    assert WordEffect(12, 0, 10, 8.1, controls).percentile_95 == pytest.approx(1.805)
    assert WordEffect(12, 0, 10, 8.1, controls).counts
    assert not WordEffect(12, 0, 10, 8.2, controls).counts


def test_every_variant_writes(pair):
    target, base, adapters = pair
    seen = []

    def write(model):
        seen.append(model(input_ids=torch.tensor([[2, 5, 7]])).logits)
        return ["wait"] * len(seen) + ["no"] * 9

    effect = ablation_effect(
        target, base, adapters, WordClass(["wait"]), [(0, 1)], [[(1, 2)], [(2, 3)]], write
    )
    assert len(seen) == 6
    assert (
        effect.target
        < effect.hybrid
        < effect.adapted
        < effect.ablated
        < effect.controls[0]
        < effect.controls[1]
    )


def test_evaluation_and_recovery(pair, data):
    target, base, _ = pair
    exact = [TranscoderAdapter(32, 4, dtype=torch.float64).eval() for _ in range(3)]
    adapters = AdapterSet(exact, adapter_sites(target))  # add nothing: adapted is the hybrid
    found = evaluate_adapters(target, base, adapters, data, split="train", tokens=200)
    assert found.adapted.kl == found.hybrid.kl > 0
    assert found.kl_recovered == 0
    assert found.single_adapted_kl == found.single_hybrid_kl
    assert found.to_dict()["adapted"]["mean_l0"] == found.adapted.mean_l0
    scores = iter([3.0, 1.0, 2.0])
    won = recovery(target, base, adapters, lambda model: {"score": next(scores), "same": 1.0})
    assert won["score"].recovered == 0.5
    assert math.isnan(won["same"].recovered)
    assert won["same"].to_dict()["recovered"] is None  # JSON has no NaN
