"""The same graphs on a GPU."""

import pytest
import torch

import fasttc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("options", [{}, {"max_feature_nodes": 40, "refresh": 16}, {"edge_share": 0.8}])
def test_same_edges_as_on_the_cpu(family, options, tiny_model, random_set, prompt_ids):
    model = tiny_model(family)
    tcs = random_set(model, "jumprelu", skip=True)
    expected = fasttc.attribute(model, tcs, prompt_ids, **options)
    graph = fasttc.attribute(model.cuda(), tcs.to("cuda"), prompt_ids, **options)
    assert torch.equal(graph.features, expected.features)
    scale = float(expected.values.abs().max())
    if "edge_share" not in options:
        torch.testing.assert_close(graph.dense(), expected.dense(), rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(graph.row_mass(), expected.row_mass(), rtol=1e-4, atol=1e-5 * scale)
    assert graph.metadata["precision"]["device"] == "cuda"


def test_short_weights(tiny_model, random_set, prompt_ids):
    model = tiny_model("gemma2").cuda()
    tcs = random_set(model).to("cuda")
    exact = fasttc.attribute(model, tcs, prompt_ids)
    short = fasttc.attribute(model, tcs, prompt_ids, weight_dtype=torch.bfloat16)
    difference = (short.dense() - exact.dense()).norm() / exact.dense().norm()
    assert 0 < difference < 2**-7  # roundings of weights and of gradients
