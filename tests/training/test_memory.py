"""The memory that a training of transcoders announces, against what one holds."""

from types import SimpleNamespace

import pytest
import torch

from fasttc.nn import Transcoder
from fasttc.training import adapt, train
from fasttc.training.adapt import AdaptOptions
from fasttc.training.closed_form import HELD_OUT_TOKENS, held_out_watch
from fasttc.training.memory import estimate
from fasttc.training.transcoding import TranscoderTask


def nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(("buffer", "update_tokens"), [(1, None), (3, 64), (2, None)])
def test_what_is_counted_is_what_a_training_holds(model, data, monkeypatch, buffer, update_tokens):
    base, _ = train(model, data, n_features=64, k=8, tokens=500, batch_size=8, progress=False)
    options = {
        "tokens": 800,
        "batch_size": 8,
        "buffer": buffer,
        "update_tokens": update_tokens,
        "patience": 9,
    }
    seen = SimpleNamespace(pieces=[], watch=None, task=None)
    split = TranscoderTask.split

    def splitting(task, batch, step):
        seen.pieces = split(task, batch, step)
        return seen.pieces

    def watching(*args):
        seen.watch = held_out_watch(*args)
        return seen.watch

    monkeypatch.setattr(TranscoderTask, "split", splitting)
    monkeypatch.setattr("fasttc.training.fit.held_out_watch", watching)
    adapt(model, base, data, progress=False, callbacks=[lambda p: setattr(seen, "task", p.task)], **options)
    found = estimate(model, list(base), AdaptOptions(**options), data.context).parts

    parameters = [p for t in seen.task.transcoders for p in t.parameters()]
    moments = [t for name, t in seen.task.optimiser.state().items() if "exp_avg" in name]
    assert found["weights"] == found["gradients"] == nbytes(parameters)
    assert found["Adam"] == nbytes(moments)
    assert found["best weights"] == nbytes(seen.watch.state()[0].values())
    block = sum(nbytes([*xs, *ys]) for xs, ys in seen.pieces)
    whole = found["activations"] / (1 if buffer == 1 else 2)
    assert block < whole < 1.4 * block  # padding and the first tokens of documents are not kept
    tokens = len(seen.pieces[0][0][0])
    assert tokens <= 8 * 16 * buffer // len(seen.pieces) < 1.5 * tokens


def test_held_out_tokens_do_not_depend_on_those_of_the_report(model):
    transcoders = [Transcoder(32, 64, k=8)]
    one, two = (
        estimate(model, transcoders, AdaptOptions(validation_tokens=n, whiten=False), 16).parts
        for n in (100, 100_000)
    )
    assert one == two
    assert one["held-out activations"] == 4 * 64 * HELD_OUT_TOKENS
    whitened = estimate(model, transcoders, AdaptOptions(), 16).parts
    assert whitened["held-out activations"] == 4 * 96 * HELD_OUT_TOKENS


def test_a_buffer_holds_activations_and_does_not_widen_the_forward_or_the_encode(model):
    transcoders = [Transcoder(32, 64, k=8, device=torch.device("meta"))]
    parts = [
        estimate(model, transcoders, AdaptOptions(buffer=n, update_tokens=128), 16).parts for n in (1, 16)
    ]
    assert parts[1]["activations"] == 2 * 16 * parts[0]["activations"]
    for name in ("model", "encode", "closed form"):
        assert parts[1][name] == parts[0][name]


def test_a_closed_form_alone_takes_no_gradient(model):
    parts = estimate(model, [Transcoder(32, 64, k=8)], AdaptOptions(refit="only"), 16).parts
    assert parts["gradients"] == parts["Adam"] == parts["best weights"] == 0
    assert parts["closed form"] > 0
