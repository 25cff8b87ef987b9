"""What edges mean: they add up to pre-activations, and predict interventions in the frozen model exactly."""

import pytest
import torch

import fasttc
from fasttc.models import float64_exact
from fasttc.models.linear import unembedding


def pre_activations(graph, tcs, x):
    """Pre-activation (without b_enc) of each feature node, from the MLP inputs of all layers."""
    return torch.stack(
        [x[layer][position] @ tcs[layer].W_enc[index] for layer, position, index in graph.features]
    )


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_edges_and_biases_add_up_to_the_pre_activation(
    family, skip, tiny_model, random_set, oracle, prompt_ids
):
    model = tiny_model(family)
    tcs = random_set(model, "jumprelu" if skip else "relu", skip=skip, n_features=24)
    graph = fasttc.attribute(model, tcs, prompt_ids)
    frozen = oracle(model, tcs, prompt_ids)
    with torch.no_grad():
        reached = pre_activations(graph, tcs, frozen.x)
        without_sources, _ = frozen.run(entry=frozen.entry - frozen.tokens, written=frozen.biases())
        bias = pre_activations(graph, tcs, without_sources)
    edges = graph.dense()[: graph.n_features]
    scale = edges.abs().sum(1) + bias.abs()
    assert bool(((edges.sum(1) + bias - reached).abs() <= 1e-4 * scale).all())
    assert float((bias.abs() / scale).max()) > 0.01  # the biases are no rounding error


def sources(graph):
    """A few features of every layer but the last, an error and a token: (kind, layer, position, index, column)."""
    chosen = []
    for layer in range(graph.n_layers - 1):
        columns = (graph.features[:, 0] == layer).nonzero()[:, 0]
        for column in columns[:: max(1, len(columns) // 3)].tolist():
            chosen.append(("feature", *graph.features[column].tolist(), column))
    error = graph.error_slice.start + graph.n_tokens + 3  # layer 1, position 3
    return [*chosen, ("error", 1, 3, -1, error), ("token", -1, 2, -1, graph.token_slice.start + 2)]


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_intervention_changes_targets_by_the_edge(family, skip, tiny_model, random_set, oracle, prompt_ids):
    model = tiny_model(family, dtype=torch.float64)
    tcs = random_set(model, "topk", skip=skip, n_features=24)
    with float64_exact(model), torch.no_grad():
        graph = fasttc.attribute(model, tcs, prompt_ids)
        frozen = oracle(model, tcs, prompt_ids)
        rows = unembedding(model)
        directions = rows.weight[graph.logit_ids] - rows.mean
        base_x, base_final = frozen.run()
        before = torch.cat([pre_activations(graph, tcs, base_x), directions @ base_final[-1]])
        edges = torch.cat([graph.dense()[: graph.n_features], graph.dense()[graph.logit_slice]])
        for kind, layer, position, index, column in sources(graph):
            relative = -0.7
            written, entry = frozen.constants(), frozen.entry.clone()
            if kind == "feature":
                effect = graph.activations[column] * tcs[layer].W_dec[index]
                written[layer][position] += relative * effect
            elif kind == "error":
                written[layer][position] += relative * frozen.errors()[layer][position]
            else:
                entry[position] += relative * frozen.tokens[position]
            x, final = frozen.run(entry, written)
            after = torch.cat([pre_activations(graph, tcs, x), directions @ final[-1]])
            change = after - before
            assert float(change.abs().max()) > 1e-6, f"{kind} {layer} {position} moved nothing"
            torch.testing.assert_close(change, relative * edges[:, column], rtol=0, atol=1e-10)
