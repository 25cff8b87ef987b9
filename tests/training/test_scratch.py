"""Transcoders from scratch: they learn, reach the L0 asked for, revive dead features, and start well."""

import json

import pytest
import torch

from fasttc.models import default_sites
from fasttc.nn import Transcoder, TranscoderSet
from fasttc.training import train
from fasttc.training.activations import activation_source
from fasttc.training.closed_form import sample
from fasttc.training.quality import LayerStatistics, measure
from fasttc.training.scratch import INITIAL_TOKENS, ScratchOptions, initial_transcoders
from fasttc.training.transcoding import Objective, TranscoderTask, activation_scales, steer

QUICK = {"n_features": 64, "k": 8, "batch_size": 8, "progress": False, "validation_tokens": 400}


def test_training_lowers_fvu_on_a_real_model(shared_data):
    from fasttc.models import load

    model, tokenizer = load(shared_data / "models" / "stories260K")
    text = {"text": "{QUESTION} {CONTEXTS}", "layers": (0, 3), "context": 64}
    source = shared_data / "pubmedqa" / "ori_pqal.json"
    options = QUICK | text | {"n_features": 256, "k": 16}
    fvus = [train(model, source, tokenizer, tokens=tokens, **options)[1].fvu for tokens in (512, 12_000)]
    assert fvus[1] < 0.75 * fvus[0]
    assert fvus[1] < 0.5


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
@pytest.mark.parametrize("skip", [False, True])
def test_every_activation_learns_at_the_l0_asked_for(model, data, activation, skip):
    tcs, report = train(
        model, data, tokens=40_000, activation=activation, skip=skip, layers=(1,), seed=1, **QUICK
    )
    assert report.layers[0].fvu < (0.2 if skip else 0.35)
    tolerance = {"topk": 0.1, "batchtopk": 1.0, "jumprelu": 1.2, "relu": 1.6}[activation]
    assert abs(report.layers[0].l0 - 8) <= tolerance
    assert tcs[0].activation == activation
    assert tcs[0].skip == skip


def test_report_metadata_and_files(model, data, tmp_path):
    seen = []
    tcs, report = train(
        model,
        data,
        tokens=2000,
        out=tmp_path / "tcs",
        callbacks=[seen.append],
        log_every=4,
        checkpoint_every=8,
        **QUICK,
    )
    assert [p.step for p in seen] == list(range(1, 17))
    assert report.steps == 16
    assert 0.8 * 16 * 128 < report.tokens <= 16 * 128
    assert seen[-1].tokens == report.tokens
    assert report.config["k"] == 8 and report.seed == 0  # noqa: PT018
    assert report.documents == {"train": 180, "validation": 10, "test": 10}
    assert [q.layer for q in report.layers] == [0, 1, 2]
    assert all(q.tokens > 20 and q.l0 <= 8 for q in report.layers)
    lines = [json.loads(line) for line in (tmp_path / "tcs.run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    assert len(lines[0]["fvu"]) == 3
    assert json.loads((tmp_path / "tcs.run" / "report.json").read_text()) == json.loads(
        json.dumps(report.to_dict())
    )
    assert not (tmp_path / "tcs.run" / "checkpoint").exists()
    loaded = TranscoderSet.from_pretrained(tmp_path / "tcs")
    assert loaded.metadata["training"]["fvu"] == report.fvu
    for one, two, site in zip(loaded, tcs, tcs.sites, strict=True):
        assert not two.training
        assert site.write
        for name, tensor in two.state_dict().items():
            assert torch.equal(tensor, one.state_dict()[name])


def test_same_seed_same_bits_other_seed_other_bits(model, data, same_tensors):
    one, two, other = (train(model, data, tokens=600, seed=s, layers=(0,), **QUICK)[0][0] for s in (3, 3, 4))
    same_tensors(dict(one.state_dict()), dict(two.state_dict()))
    assert not torch.equal(one.W_enc, other.W_enc)


def test_the_model_and_the_random_generator_are_left_alone(model, data, same_tensors):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, data, tokens=300, **QUICK)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    same_tensors(dict(model.state_dict()), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bos_and_padding_never_reach_the_transcoders(model, data):
    batch = next(data.batches("train", 6))
    sites = default_sites(model)
    with activation_source(model, sites) as source:
        xs, ys = source.read(batch)
        with torch.no_grad():
            from fasttc.models import capture

            with capture(model, sites) as record:
                model(**batch.model_inputs)
            kept = batch.mask.flatten()
            for i in range(3):
                torch.testing.assert_close(xs[i], record.x[i].flatten(0, 1)[kept])
                torch.testing.assert_close(ys[i], record.y[i].flatten(0, 1)[kept])
    assert kept.sum() < kept.numel()


def test_initial_weights_are_useful_at_once(model, data):
    config = ScratchOptions(n_features=256, k=8)
    with activation_source(model, default_sites(model)) as source:
        xs, ys = sample(source, data, "train", 8, INITIAL_TOKENS)
        start = initial_transcoders(xs, ys, config)
        quality = measure(source, start, data.batches("train", 8))
    for q, transcoder, x in zip(quality, start, xs, strict=True):
        assert q.fvu < 0.9
        assert q.dead < 0.2
        assert q.l0 == pytest.approx(8, abs=0.5)
        centred = transcoder.pre_activations(x).mean(0).abs()
        assert centred.max() < 0.05 * transcoder.pre_activations(x).std()
    unit = initial_transcoders(xs, ys, ScratchOptions(n_features=256, k=8, unit_decoder=True))
    torch.testing.assert_close(unit[0].W_dec.norm(dim=1), torch.ones(256))


def test_unit_decoder_is_kept(model, data):
    tcs, _ = train(model, data, tokens=1000, unit_decoder=True, layers=(0,), **QUICK)
    torch.testing.assert_close(tcs[0].W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize("aux", [0.0, 1 / 32])
def test_auxk_revives_dead_features(model, data, aux):
    with activation_source(model, default_sites(model)[:1]) as source:
        xs, ys = sample(source, data, "train", 8, INITIAL_TOKENS)
        transcoder = initial_transcoders(xs, ys, ScratchOptions(n_features=64, k=4))[0]
        with torch.no_grad():  # too small ever to be among the four largest
            transcoder.W_enc[:32] *= 0.02
            transcoder.b_enc[:32] *= 0.02
            transcoder.W_dec[:32] = 0
        scales = [activation_scales(xs[0], ys[0])]
        task = TranscoderTask(
            [transcoder], source, Objective(aux=aux, dead_after=1000), scales, decoder_scale=1.0
        )
        stream = data.stream("train", 8)
        dead = []
        for _ in range(200):
            (part,) = task.split(stream.next(), 0)
            metrics = task.backward(part)
            task.optimiser.step(1e-2)
            task.after_update(metrics)
            dead.append(float(metrics["dead"][0]))
    assert dead[0] == 0
    assert dead[20] == pytest.approx(0.5, abs=0.05)
    assert dead[-1] < 0.2 if aux else dead[-1] > 0.4


def test_steer_finds_the_weight_for_a_target():
    weight, l0 = torch.tensor(1e-3), torch.tensor(0.0)
    for _ in range(400):
        l0 = 40 / (1 + 100 * weight)  # a penalty lowers L0
        weight = steer(weight, l0, 8.0)
    assert float(l0) == pytest.approx(8.0, rel=0.02)


def test_quality_matches_the_definitions():
    torch.manual_seed(0)
    transcoder = Transcoder(6, 20, activation="relu").double().eval()
    x, y = torch.randn(50, 6).double(), 100 + torch.randn(50, 6).double()
    statistic = LayerStatistics(transcoder)
    for part in (slice(0, 20), slice(20, 20), slice(20, 50)):
        statistic.add(x[part], y[part])
    got = statistic.result(3)
    error = (transcoder(x) - y).square().sum().detach()
    assert got.fvu == pytest.approx(
        float(error / (y.square().sum() - 50 * y.mean(0).square().sum())), rel=1e-9
    )
    assert got.mse == pytest.approx(float(error / 50))
    active = transcoder.pre_activations(x) > 0
    assert got.l0 == pytest.approx(float(active.double().sum(1).mean()))
    assert got.dead == float((~active.any(0)).double().mean())
    assert (got.layer, got.tokens) == (3, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 65}, "k: expected at most n_features = 64, got 65"),
        ({"k": 0}, "k: expected an int >= 1, got 0"),
        ({"tokens": 0}, "tokens: expected an int >= 1"),
        ({"activation": "gelu"}, "activation: expected one of topk"),
        ({"lr": -1.0}, "lr: expected a number > 0"),
        ({"decay": "step"}, "decay: expected one of"),
        ({"warmup": 1.0}, r"warmup: expected a share of the steps in \[0, 1\)"),
        ({"layers": (7,)}, r"layers: expected some of \[0, 1, 2\], got \[7\]"),
        ({"l1": 0.1}, "l1: expected None for activation 'topk'"),
        ({"unit_decoder": True, "refit": "last"}, "refit: expected None with unit_decoder .*, got 'last'"),
        ({"unit_decoder": True, "refit": "only"}, "refit: expected None with unit_decoder .*, got 'only'"),
        ({"aux": -1.0}, "aux: expected a number >= 0"),
        ({"seed": 0.5}, "seed: expected an int"),
        ({"resume": True}, "resume: expected out="),
        ({"resume": "yes"}, "resume: expected True, False or 'auto'"),
        ({"log_every": 0}, "log_every: expected an int >= 1"),
    ],
)
def test_bad_options(model, data, options, message):
    with pytest.raises(ValueError, match=message):
        train(model, data, **(QUICK | {"tokens": 300} | options))


def test_an_unknown_option_is_named(model, data):
    with pytest.raises(TypeError, match="train: unknown option 'widht'; expected one of tokens, lr"):
        train(model, data, widht=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_activations_are_not_finite_is_named(model, data, value):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"model: expected finite activations, .* at layer 1"):
        train(model, data, tokens=500, n_features=16, k=2, progress=False)
