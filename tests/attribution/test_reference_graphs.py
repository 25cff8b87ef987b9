"""Attribution against circuit-tracer's graphs of small public cases, in float32 and float64."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fasttc
from fasttc.models import float64_exact, load

CASES = ["gemma2_jumprelu", "llama_topk_skip"]


@pytest.fixture
def case(request, shared_data) -> Path:
    return shared_data / "oracle" / request.param


def attribute(case: Path, dtype: torch.dtype, **options) -> fasttc.Graph:
    model, tokenizer = load(case / "hf_model", dtype=dtype)
    tcs = fasttc.TranscoderSet.from_pretrained(case / "transcoders", dtype=dtype)
    ids = json.loads((case / "prompt.json").read_text())["input_ids"]
    with float64_exact(model) if dtype == torch.float64 else nullcontext():
        return fasttc.attribute(model, tcs, ids, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("case", CASES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_same_graph(case, dtype):
    exact = dtype == torch.float64
    graph = attribute(case, dtype)
    expected = load_file(case / ("ct_graph_f64.safetensors" if exact else "ct_graph.safetensors"))
    assert torch.equal(graph.features, expected["active_features"])
    assert torch.equal(graph.input_ids, expected["input_tokens"])
    assert torch.equal(graph.logit_ids, expected["logit_token_ids"])
    edges = expected["adjacency"]
    assert graph.values.dtype == dtype
    tolerance = 1e-9 if exact else 1e-5 * float(edges.abs().max())
    for got, wanted in (
        (graph.dense(), edges),
        (graph.activations, expected["activation_values"]),
        (graph.logit_probs, expected["logit_probabilities"]),
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance, check_dtype=False)

    pruned = graph.prune(0.8, 0.98)
    masks = load_file(case / "ct_prune.safetensors")
    assert torch.equal(pruned.node_mask, masks["node_mask"])
    assert torch.equal(pruned.dense_mask(), masks["edge_mask"])

    scores = json.loads((case / "scores.json").read_text())
    wanted = scores["float64"] if exact else scores
    tolerance = 1e-9 if exact else 1e-5
    assert graph.scores().replacement == pytest.approx(wanted["replacement"], abs=tolerance)
    assert graph.scores().completeness == pytest.approx(wanted["completeness"], abs=tolerance)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_capped_graph_is_a_part_of_the_whole(case):
    whole, part = (
        attribute(case, torch.float32),
        attribute(case, torch.float32, max_feature_nodes=150, refresh=40),
    )
    assert part.n_features == 150
    nodes = [int((whole.features == feature).all(1).nonzero()) for feature in part.features]
    nodes += range(whole.n_features, whole.n_nodes)
    torch.testing.assert_close(
        part.dense(), whole.dense()[nodes][:, nodes], rtol=0, atol=1e-6 * float(whole.values.abs().max())
    )
    # Almost all of what matters is among the chosen: ranking by the rows known so far is close to the truth.
    best = whole.influence()[: whole.n_features].sort(descending=True).values
    assert whole.influence()[nodes[:150]].sum() > 0.95 * best[:150].sum()
