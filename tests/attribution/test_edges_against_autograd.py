"""Every edge against autograd through the frozen Hugging Face model, in float64."""

import pytest
import torch

import fasttc
from fasttc.models import float64_exact
from fasttc.models.linear import unembedding


def check(model, tcs, ids, oracle, **options):
    with float64_exact(model):
        graph = fasttc.attribute(model, tcs, ids, **options)
        expected = oracle(model, tcs, ids).adjacency(graph, unembedding(model).weight)
    assert graph.n_features > 20
    assert graph.values.dtype == torch.float64
    error = (graph.dense() - expected).abs().max()
    assert error <= 1e-10 * expected.abs().max(), f"largest difference {error}"
    return graph


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_all_families(family, skip, tiny_model, random_set, oracle, prompt_ids):
    model = tiny_model(family, dtype=torch.float64)
    tcs = random_set(model, "topk" if skip else "jumprelu", skip=skip)
    check(model, tcs, prompt_ids, oracle)


@pytest.mark.parametrize("y", ["mlp_out", "mlp_out_post"])
@pytest.mark.parametrize("x", ["mlp_in", "normalized", "resid_mid"])
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox"])
def test_all_sites(family, x, y, tiny_model, random_set, oracle, prompt_ids):
    model = tiny_model(family, dtype=torch.float64)
    tcs = random_set(model, "relu", skip=True, x=x, y=y, n_features=12)
    check(model, tcs, prompt_ids[:6], oracle)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_all_activations(activation, tiny_model, random_set, oracle, prompt_ids):
    model = tiny_model("llama", dtype=torch.float64)
    tcs = random_set(model, activation, n_features=24)
    for transcoder in tcs:
        transcoder.train()  # attribution evaluates all the same, and leaves them as they are
    with float64_exact(model):
        graph = fasttc.attribute(model, tcs, prompt_ids)
        assert all(transcoder.training for transcoder in tcs)
        for transcoder in tcs:
            transcoder.eval()
        expected = oracle(model, tcs, prompt_ids).adjacency(graph, unembedding(model).weight)
    assert (graph.dense() - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_more_positions_zeroed(tiny_model, random_set, oracle, prompt_ids):
    model = tiny_model("gemma3", dtype=torch.float64)
    graph = check(model, random_set(model, zero_positions=4, skip=True), prompt_ids, oracle)
    assert int(graph.features[:, 1].min()) == 4


def test_sequential_gpt_neox(tiny_model, random_set, oracle, prompt_ids):
    model = tiny_model("gpt_neox", dtype=torch.float64, use_parallel_residual=False)
    check(model, random_set(model, skip=True), prompt_ids, oracle)
