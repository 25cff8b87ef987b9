"""Whitened coordinates: the same function of x, inputs of another shape, and nothing that is frozen moves."""

import copy

import pytest
import torch

from fasttc.nn import Transcoder
from fasttc.training import AdaptOptions, ScratchOptions, whitening
from fasttc.training.activations import activation_source
from fasttc.training.whitening import SHRINKAGE, Coordinates, Whitening

ALL = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")


def skewed(n: int = 400, d: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """x [n, d] whose directions differ a thousandfold in size, about a mean far from zero."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    scales = torch.logspace(1, -2, d, dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * scales @ mixed + 7.0
    return x.to(dtype)


def test_inputs_are_centred_and_half_whitened():
    x = skewed()
    inside = Coordinates.of(x).of_inputs(x)
    variances = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    expected = variances / (variances + SHRINKAGE * variances.mean()).sqrt()
    torch.testing.assert_close(inside.mean(0), torch.zeros(6, dtype=x.dtype), atol=1e-12, rtol=0)
    found = torch.linalg.eigvalsh(torch.cov(inside.T, correction=0))
    torch.testing.assert_close(found, expected.sort().values, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_a_transcoder_stays_the_same_function(activation, skip):
    torch.manual_seed(1)
    transcoder = Transcoder(6, 20, 5, activation, 4, skip, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.normal_()
        if transcoder.threshold is not None:
            transcoder.threshold.fill_(0.3)
    before = {name: t.clone() for name, t in transcoder.state_dict().items()}
    x = skewed()
    coordinates = Coordinates.of(x)
    with torch.no_grad():
        z, y = transcoder.pre_activations(x), transcoder(x)
        coordinates.enter(transcoder)
        inside = coordinates.of_inputs(x)
        torch.testing.assert_close(transcoder.pre_activations(inside), z, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(transcoder(inside), y, atol=1e-8, rtol=1e-8)
    assert not torch.allclose(transcoder.W_enc, before["W_enc"])
    coordinates.leave(transcoder)
    for name, tensor in transcoder.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-11, rtol=1e-11)


def test_a_wide_encoder_is_rewritten_a_few_rows_at_a_time(monkeypatch):
    coordinates = Coordinates.of(skewed())
    whole = Transcoder(6, 10, k=2, skip=True, dtype=torch.float64)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_()
    pieces = copy.deepcopy(whole)
    coordinates.enter(whole)
    monkeypatch.setattr(whitening, "ROWS_AT_ONCE", 3)
    coordinates.enter(pieces)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(pieces.state_dict()[name], tensor, rtol=1e-14, atol=1e-14)


def test_tokens_all_alike_are_only_centred():
    x = torch.full((5, 3), 2.0)
    coordinates = Coordinates.of(x)
    assert torch.equal(coordinates.squeeze, torch.eye(3, dtype=torch.float64))
    assert torch.equal(coordinates.of_inputs(x + 1), torch.ones(5, 3))


def test_a_whitened_source_gives_the_same_tokens_in_other_coordinates(model, data):
    from fasttc.models import default_sites

    batch = next(data.batches("train", 8))
    with activation_source(model, default_sites(model)) as source:
        xs, ys = source.read(batch)
        transcoders = [Transcoder(32, 16, k=4) for _ in xs]
        coordinates = Whitening(xs)
        inside, held = coordinates.enter(source, transcoders, xs)
        got, targets = inside.read(batch)
        assert inside.sites == source.sites
        assert inside.own == source.own
        assert torch.equal(inside.places(batch), source.places(batch))
        for x, same, layer in zip(got, held, xs, strict=True):
            assert torch.equal(x, same)
            assert x.dtype == layer.dtype
            assert float(x.mean(0).abs().max()) < 1e-4 * float(layer.abs().max())
        for y, target in zip(ys, targets, strict=True):
            assert torch.equal(y, target)


def test_switched_off_nothing_is_touched(model, data):
    xs = [skewed(dtype=torch.float32)]
    transcoder = Transcoder(6, 8, k=2)
    before = transcoder.W_enc.clone()
    coordinates, source = Whitening(xs, active=False), object()
    inside, held = coordinates.enter(source, [transcoder], xs)
    coordinates.leave([transcoder])
    assert inside is source
    assert held[0] is xs[0]
    assert torch.equal(transcoder.W_enc, before)


@pytest.mark.parametrize(
    ("options", "trained", "skip", "expected"),
    [
        ({}, ALL, False, True),
        ({}, ALL, True, True),
        ({"whiten": False}, ALL, False, False),
        ({"refit": "only"}, ALL, False, False),
        ({}, ("W_enc", "b_enc"), False, True),
        ({}, ("W_enc", "b_enc", "W_dec", "b_dec"), True, False),  # the skip path is frozen
        ({}, ("W_enc", "W_dec"), False, False),  # a bias that is frozen holds none of the mean
        ({}, ("W_dec", "b_dec"), False, False),
    ],
)
def test_what_is_frozen_is_not_rewritten(options, trained, skip, expected):
    for kind in (AdaptOptions, ScratchOptions):
        assert kind(**options).whitens(trained, skip) is expected
