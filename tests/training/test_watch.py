"""Early stops with the best weights, divergence that keeps them, buffers of several batches."""

import re

import pytest
import torch

from fasttc.models import default_sites
from fasttc.training import Diverged, Interrupted, adapt, finetune_ffn, train
from fasttc.training.activations import RememberedSource, activation_source
from fasttc.training.watch import Watch

QUICK = {
    "batch_size": 8,
    "progress": False,
    "validation_tokens": 1000,
    "layers": (1,),
    "n_features": 64,
    "k": 8,
}


def test_the_best_look_is_kept():
    weight = torch.zeros(2)
    figures = iter([3.0, 1.0, 2.0, 1.5])
    watch = Watch(1, 2, lambda: next(figures), {"w": weight})
    stops = []
    for step in range(4):
        weight.fill_(step)
        stops.append(watch.look(step))
        if stops[-1]:
            break
    assert stops == [False, False, False, True]
    again = Watch(1, 2, lambda: 0.0, {"w": weight})
    again.restore(*watch.state())
    assert again.state()[1] == {"best": 1.0, "best_step": 1, "worse": 2}
    assert again.put_back()
    assert weight.tolist() == [1, 1]
    assert not Watch(1, 2, lambda: 0.0, {"w": weight}).put_back()


def test_a_training_stops_when_nothing_gets_better(model, data):
    _, report = train(model, data, tokens=8000, lr=1e-9, patience=3, refit="last", **QUICK)
    assert "no better on held-out tokens after step" in report.stopped
    assert report.steps < 8000 // (8 * 16)
    assert report.tokens <= report.steps * 8 * 16
    whole = train(model, data, tokens=2000, patience=3, **QUICK)[1]
    assert whole.stopped == ""


def test_a_diverging_loss_says_its_step_and_keeps_the_best(model, data):
    with pytest.raises(Diverged, match=r"training diverged at step \d+: loss .*try a lower learning rate"):
        train(model, data, tokens=8000, lr=1e4, **QUICK)
    tcs, report = train(model, data, tokens=8000, lr=1e4, patience=100, **QUICK)
    assert "training diverged at step" in report.stopped
    assert "kept the weights of step" in report.stopped
    assert all(p.isfinite().all() for p in tcs[0].parameters())


def test_stops_resume_to_the_same_bits(model, data, tmp_path, interrupt, same_tensors):
    options = QUICK | {"tokens": 4000, "patience": 2, "refit": "last", "buffer": 2}
    whole, report = train(model, data, **options)
    with pytest.raises(Interrupted):
        train(model, data, out=tmp_path / "a", callbacks=[interrupt(report.steps - 1)], **options)
    resumed, again = train(model, data, out=tmp_path / "a", resume=True, **options)
    same_tensors(dict(whole[0].state_dict()), dict(resumed[0].state_dict()))
    assert (again.stopped, again.steps) == (report.stopped, report.steps)


def test_a_kill_after_an_early_stop_resumes_to_the_same_bits(
    model, data, tmp_path, same_tensors, monkeypatch
):
    """The checkpoint of the step at which training stopped knows that it did."""
    options = QUICK | {"tokens": 8000, "lr": 1e-9, "patience": 2, "log_every": 1}
    whole, report = train(model, data, **options)
    assert "no better on held-out tokens" in report.stopped

    def kill(*_):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("fasttc.training.fit.refit_last", kill)
        with pytest.raises(RuntimeError, match="power cut"):
            train(model, data, out=tmp_path / "a", checkpoint_every=report.steps, **options)
    resumed, again = train(model, data, out=tmp_path / "a", resume=True, **options)
    same_tensors(dict(whole[0].state_dict()), dict(resumed[0].state_dict()))
    assert (again.stopped, again.steps) == (report.stopped, report.steps)


def test_the_best_weights_come_with_their_threshold(model, data):
    """Of BatchTopK: a buffer, which moves with every batch."""
    seen = {}

    def note(progress):
        seen[progress.step] = float(progress.task.transcoders[0].threshold)

    options = QUICK | {"tokens": 8000, "lr": 1e-9, "patience": 2, "activation": "batchtopk"}
    tcs, report = train(model, data, callbacks=[note], **options)
    best = int(re.findall(r"after step (\d+)", report.stopped)[0])
    assert seen[best] != seen[report.steps]
    assert float(tcs[0].threshold) == seen[best]


def test_a_buffer_mixes_batches_and_runs_the_model_on_one_at_a_time(model, data):
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    report = train(model, data, tokens=4 * 3 * 128, buffer=3, update_tokens=64, **QUICK)[1]
    handle.remove()
    assert max(seen) == 8
    assert report.steps == 4
    with activation_source(model, default_sites(model)) as whole:
        batch = data.stream("train", 24).next()
        expected = whole.read(batch)
    with activation_source(model, default_sites(model), rows=7) as pieces:
        remembered = RememberedSource(pieces)
        for found in (pieces.read(batch), remembered.read(batch), remembered.read(batch)):
            for one, two in zip(found, expected, strict=True):
                for a, b in zip(one, two, strict=True):
                    torch.testing.assert_close(a, b)
    assert remembered.nbytes == sum(t.nbytes for side in expected for t in side)


def test_a_source_of_other_sites_is_refused(model, data):
    base, _ = train(model, data, tokens=300, **QUICK)
    with (
        activation_source(model, default_sites(model)[:1]) as source,
        pytest.raises(
            ValueError, match=r"source: expected the sites \[\(1, 'mlp_in', 'mlp_out'\)\], got \[\(0"
        ),
    ):
        adapt(model, base, data, tokens=300, source=source, progress=False)
    with pytest.raises(ValueError, match="buffer: expected an int >= 1, got 0"):
        adapt(model, base, data, tokens=300, buffer=0)
    with pytest.raises(ValueError, match="patience: expected an int >= 1, got -1"):
        adapt(model, base, data, tokens=300, patience=-1)


def test_remembered_activations_train_as_fresh_ones_do(model, data):
    base, _ = train(model, data, tokens=2000, **QUICK)
    tuned = finetune_ffn(model, data, tokens=2000, lr=3e-3, batch_size=8, progress=False)
    fresh = adapt(tuned, base, data, tokens=2000, progress=False, batch_size=8)[1].fvu
    with activation_source(tuned, base.sites) as source:
        remembered = RememberedSource(source)
        for _ in range(2):
            found = adapt(tuned, base, data, tokens=2000, progress=False, batch_size=8, source=remembered)[
                1
            ].fvu
            assert found == pytest.approx(fresh, rel=1e-3)
