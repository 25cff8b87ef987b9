"""PAT: base transcoders find the fine-tuned MLPs again, at the base's L0."""

import pytest
import torch

from fasttc.models import load
from fasttc.nn import Site, Transcoder, TranscoderSet
from fasttc.training import adapt, finetune_ffn, train

QUICK = {"batch_size": 8, "progress": False, "validation_tokens": 1000}


@pytest.fixture
def tuned(model, data):
    return finetune_ffn(model, data, tokens=4000, lr=3e-3, **QUICK)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_adaptation_closes_the_gap_at_the_same_l0(model, tuned, data, activation, same_tensors):
    base, _ = train(model, data, n_features=64, k=8, tokens=20_000, activation=activation, **QUICK)
    before = [dict(tc.state_dict()) for tc in base]
    before = [{name: t.clone() for name, t in state.items()} for state in before]
    adapted, report = adapt(tuned, base, data, tokens=10_000, **QUICK)
    for state, tc in zip(before, base, strict=True):
        same_tensors(dict(tc.state_dict()), state)
    assert report.to_dict()["fvu_before"] > 0.25
    assert report.fvu < 0.8 * report.to_dict()["fvu_before"]
    for quality, old in zip(report.layers, report.before, strict=True):
        assert quality.fvu < old.fvu
        # BatchTopK keeps k in a training batch; alone, its threshold is a running mean that ten updates have moved
        # by a tenth of the way. The others follow the base.
        wanted = 8 if activation == "batchtopk" else old.l0
        assert abs(quality.l0 - wanted) <= {"topk": 0.2, "batchtopk": 0.2 * wanted}.get(
            activation, 0.12 * wanted
        )
    if activation == "jumprelu":
        for state, tc in zip(before, adapted, strict=True):
            assert torch.equal(tc.threshold, state["threshold"])
    assert adapted.metadata["base"] == base.metadata


def test_thresholds_can_be_trained_and_the_target_set(model, tuned, data):
    base, _ = train(model, data, n_features=64, k=8, tokens=10_000, activation="jumprelu", **QUICK)
    options = QUICK | {"tokens": 20_000, "lr": 0.014}  # thresholds have far to go
    adapted, report = adapt(tuned, base, data, train_threshold=True, target_l0=5.0, **options)
    assert not torch.equal(adapted[0].threshold, base[0].threshold)
    assert report.l0 == pytest.approx(5.0, rel=0.15)
    assert report.config["target_l0"] == [5.0, 5.0, 5.0]
    free = adapt(tuned, base, data, tokens=10_000, steer=False, **QUICK)[1]
    assert free.config["target_l0"] is None


def test_only_what_is_named_is_trained(model, tuned, data):
    base, _ = train(model, data, n_features=64, k=8, tokens=2000, **QUICK)
    adapted, report = adapt(tuned, base, data, tokens=2000, train=("W_dec", "b_dec"), **QUICK)
    for new, old in zip(adapted, base, strict=True):
        for name, tensor in new.named_parameters():
            assert torch.equal(tensor, old.get_parameter(name)) == (name not in ("W_dec", "b_dec"))
            assert tensor.requires_grad
    assert report.fvu < report.to_dict()["fvu_before"]


def test_half_precision_bases_and_subsets_of_layers(model, tuned, data, tmp_path):
    base, _ = train(model, data, n_features=64, k=8, tokens=2000, layers=(0, 2), **QUICK)
    base.to(dtype=torch.bfloat16)
    adapted, report = adapt(tuned, base, data, tokens=2000, out=tmp_path / "a", **QUICK)
    assert [q.layer for q in report.layers] == [0, 2]
    assert adapted[0].W_enc.dtype == torch.bfloat16
    assert report.fvu < report.to_dict()["fvu_before"]
    loaded = TranscoderSet.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded[1].W_dec, adapted[1].W_dec)


def test_the_scale_of_a_base_does_not_matter(model, tuned, data):
    """Encoder times c, decoder by c: the same function, and the same training but for rounding."""
    base, _ = train(model, data, n_features=64, k=8, tokens=2000, layers=(1,), **QUICK)
    scaled = TranscoderSet([Transcoder(32, 64, k=8)], base.sites)
    with torch.no_grad():
        for name, factor in (("W_enc", 1024.0), ("b_enc", 1024.0), ("W_dec", 1 / 1024), ("b_dec", 1.0)):
            scaled[0].get_parameter(name).copy_(factor * base[0].get_parameter(name))
    options = QUICK | {"tokens": 2000, "clip": 0.0, "aux": 0.0}
    one, two = (adapt(tuned, tcs, data, **options)[1].fvu for tcs in (base, scaled))
    assert one == pytest.approx(two, rel=0.01)


def test_foreign_transcoders_are_refused(model, data):
    sites = [Site(layer) for layer in range(3)]
    wrong = TranscoderSet([Transcoder(32, 64, k=8) for _ in range(3)], sites)
    with torch.no_grad():
        for tc in wrong:
            tc.W_dec *= 50
    with pytest.raises(ValueError, match="these explain nothing of it"):
        adapt(model, wrong, data, tokens=200, **QUICK)
    narrow = TranscoderSet([Transcoder(16, 64, k=8)], sites[:1])
    with pytest.raises(ValueError, match="expected input width 32"):
        adapt(model, narrow, data, tokens=200, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ("W_up",)}, "train: expected some of W_enc, b_enc, W_dec, b_dec, W_skip, got"),
        ({"train": ()}, "train: expected some of .*, got none"),
        (
            {"train": ("W_skip",)},
            "train: expected a parameter that every transcoder has, got W_skip; that of layer 0 has W_enc, b_enc, "
            "W_dec, b_dec",
        ),
        ({"target_l0": 0.0}, "target_l0: expected a number > 0"),
        ({"tokens": -1}, "tokens: expected an int >= 1"),
    ],
)
def test_bad_options(model, data, options, message):
    tcs = TranscoderSet([Transcoder(32, 64, k=8)], [Site(0)])
    with pytest.raises(ValueError, match=message):
        adapt(model, tcs, data, **options)


def test_stories_to_pubmedqa(shared_data):
    model, tokenizer = load(shared_data / "models" / "stories260K")
    source = shared_data / "pubmedqa" / "ori_pqal.json"
    options = {"text": "{CONTEXTS}", "progress": False, "validation_tokens": 4000}
    base, _ = train(model, source, tokenizer, n_features=256, k=16, tokens=10_000, **options)
    tuned = finetune_ffn(model, source, tokenizer, tokens=10_000, lr=1e-3, **options)
    _, report = adapt(tuned, base, source, tokenizer, tokens=6_000, **options)
    assert report.fvu < 0.85 * report.to_dict()["fvu_before"]
    assert report.l0 == pytest.approx(16, abs=0.1)
