"""Evidence for features, against a dense pass over the same corpus."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fasttc import AdapterSet, Transcoder, TranscoderAdapter, TranscoderSet
from fasttc.analysis import feature_evidence
from fasttc.analysis.largest import Largest
from fasttc.evaluation import evaluate_adapters
from fasttc.models import (
    adapter_sites,
    anatomy,
    default_sites,
    embedding_inputs,
    hybrid,
    logit_directions,
)
from fasttc.training.activations import activation_source
from fasttc.training.data import open_data


@pytest.mark.parametrize("n", [1, 3, 50])
def test_largest_keeps_what_sorting_keeps(n):
    rng = np.random.default_rng(n)
    slots, keys = rng.integers(0, 7, 2000), rng.integers(0, 300, 2000).astype(float)
    places = np.arange(2000)
    largest = Largest(8, n, ("place",))
    for part in np.array_split(places, 41):
        passing = part[largest.accepts(slots[part], keys[part])]
        largest.add(slots[passing], keys[passing], place=passing)
    found = largest.entries()
    for slot in range(8):
        mine = places[slots == slot]
        wanted = mine[np.argsort(-keys[mine], kind="stable")][:n]
        assert found["place"][found["slot"] == slot].tolist() == wanted.tolist()


def test_largest_of_nothing_is_nothing():
    assert Largest(3, 2).entries() == {}


@pytest.fixture
def setting(tiny_model):
    """Gemma-2 with random transcoders over random documents, and every activation in a dense array."""
    model = tiny_model("gemma2")
    generator = torch.Generator().manual_seed(3)
    tcs = TranscoderSet([_random(32, generator) for _ in range(3)], default_sites(model))
    documents = [
        torch.randint(3, 61, (int(n),), generator=generator).tolist() for n in [5, 9, 2, 30, 17, 1, 24] * 3
    ]
    data = open_data(model, documents, context=16)
    return model, tcs, data


def _random(d, generator):
    transcoder = Transcoder(d, 24, activation="topk", k=3)
    for parameter in transcoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return transcoder


def _dense(model, tcs, data):
    """Per layer [N, F] activations, and per token its (document piece, token id)."""
    dense, pieces, ids = [[] for _ in tcs], [], []
    with activation_source(model, tcs.sites) as source:
        for batch in data.batches("train", 2):
            for found, tc, x in zip(dense, tcs, source.read(batch)[0], strict=True):
                found.append(tc.encode(x).to_dense().detach())
            kept = batch.mask.flatten()
            first = (batch.position_ids == 0).flatten().cumsum(0) + 1000 * len(pieces)
            pieces.append(first[kept])
            ids.append(batch.input_ids.flatten()[kept])
    return [torch.cat(part) for part in dense], torch.cat(pieces), torch.cat(ids)


def test_counts_examples_and_samples_are_those_of_a_dense_pass(setting):
    model, tcs, data = setting
    dense, pieces, _ = _dense(model, tcs, data)
    found = feature_evidence(model, tcs, data, batch_size=2, examples=4, sampled=400, tokens=None)
    assert [(e.layer, e.index) for e in found] == [(layer, f) for layer in range(3) for f in range(24)]
    assert any(e.n_active == 0 for e in found) or all(e.n_active for e in found)
    for evidence in found:
        column = dense[evidence.layer][:, evidence.index].double()
        assert evidence.n_tokens == len(column)
        assert evidence.n_active == int((column != 0).sum())
        assert evidence.maximum == pytest.approx(column.max().item())
        norm = tcs[evidence.layer].W_dec[evidence.index].double().norm().item()
        assert evidence.strength == pytest.approx(column.mean().item() * norm)
        assert evidence.sample == pytest.approx(column[column != 0].sort().values.tolist())
        peaks = sorted((column[pieces == p].max().item() for p in pieces.unique()), reverse=True)
        peaks = [peak for peak in peaks if peak > 0]
        assert [max(e.activations) for e in evidence.top] == pytest.approx(peaks[:4])
        everything = [max(e.activations) for part in evidence.intervals for e in part]
        assert everything == pytest.approx(peaks)


def test_examples_show_their_document_and_nothing_else(setting):
    model, tcs, data = setting
    texts = [tuple(piece) for document in data.documents for piece in [document]]
    bos = data.bos_id
    for evidence in feature_evidence(model, tcs, data, [(0, 3), (2, 5)], batch_size=3, before=4, after=2):
        for example in evidence.top:
            assert len(example.tokens) == len(example.activations) <= 7
            assert example.activations[example.peak] == max(example.activations) > 0
            body = tuple(token for token in example.tokens if token != bos)
            assert any(body == text[i : i + len(body)] for text in texts for i in range(len(text)))


def test_same_seed_same_bits_and_order_of_features_does_not_matter(setting):
    model, tcs, data = setting
    first = feature_evidence(model, tcs, data, [(2, 5), (0, 3)], sampled=3)
    again = feature_evidence(model, tcs, data, [(0, 3), (2, 5), (0, 3)], sampled=3)
    assert first == again


@pytest.mark.parametrize(
    ("features", "message"),
    [([(7, 0)], r"got \(7, 0\)"), ([(0, 24)], r"got \(0, 24\)"), ([(0, -1)], r"\(0, -1\)"), ([], "got none")],
)
def test_features_that_do_not_exist(setting, features, message):
    model, tcs, data = setting
    with pytest.raises(ValueError, match=message):
        feature_evidence(model, tcs, data, features)


@pytest.mark.parametrize("y", ["mlp_out", "mlp_out_post"])
def test_logit_directions_are_the_derivative_where_norm_scales_stand_still(tiny_model, family, y):
    """A norm's scale does not move along a vector orthogonal to its (centred) input: there autograd agrees."""
    model = tiny_model(family)
    parts = anatomy(model)
    site = replace(default_sites(model)[1], y=y)
    vector = torch.randn(32)
    moved, norms = vector, [parts.final_norm]
    if y == "mlp_out" and parts.layers[1].mlp_post_norm is not None:
        norms.insert(0, parts.layers[1].mlp_post_norm)
    for path in norms:
        moved = _along(model.get_submodule(path), moved, centred=parts.norm == "layer")
    wanted = model.get_submodule(parts.lm_head).weight @ moved
    wanted = wanted - wanted.mean()
    found = logit_directions(model, site, vector[None])[0]
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 1 - 1e-5


def _along(norm, vector, *, centred):
    """Derivative of a norm along ``vector``, at a random input whose scale does not change along it."""
    at = torch.randn(32)
    direction = vector - vector.mean() if centred else vector
    at = at - at.mean() if centred else at
    at = at - (at @ direction) / (direction @ direction) * direction
    return torch.func.jvp(norm, (at,), (vector,))[1].detach()


@pytest.mark.parametrize("x", ["mlp_in", "normalized", "resid_mid"])
def test_embedding_inputs_are_what_the_site_reads_of_a_lone_embedding(tiny_model, family, x):
    model = tiny_model(family)
    parts = anatomy(model)
    site = replace(default_sites(model)[0], x=x)
    found = embedding_inputs(model, site)
    rows = model.get_submodule(parts.embed).weight.detach() * parts.embed_scale
    centred = rows - rows.mean(-1, keepdim=True) if parts.norm == "layer" else rows
    unit = centred / (centred.square().mean(-1, keepdim=True) + parts.norm_eps).sqrt()
    weights = model.get_submodule(parts.layers[0].mlp_norm).state_dict()
    gained = unit * (weights["weight"] + parts.gain_offset) + weights.get("bias", 0)
    wanted = {"mlp_in": gained, "normalized": unit, "resid_mid": rows}[x]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_features_of_adapters_inside_a_hybrid(tiny_model):
    """How often they fire is what the evaluation of the hybrid counts; outside of it they see other inputs."""
    target, base = tiny_model("gemma2"), tiny_model("gemma2", seed=1)
    adapters = [TranscoderAdapter(32, 12).eval() for _ in range(3)]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.W_dec)
    adapters = AdapterSet(adapters, adapter_sites(target))
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(3, 61, (n,), generator=generator).tolist() for n in [5, 9, 30, 17, 24] * 3]
    data = open_data(target, documents, context=16)
    with hybrid(target, base, adapters):
        inside = feature_evidence(target, adapters, data, tokens=None)
    outside = feature_evidence(target, adapters, data, tokens=None)
    measured = evaluate_adapters(target, base, adapters, data, split="train", tokens=None, per_layer=False)
    for layer, l0 in enumerate(measured.adapted.l0):
        assert sum(e.rate for e in inside if e.layer == layer) == pytest.approx(l0)
    assert [e.n_active for e in inside] != [e.n_active for e in outside]
