"""What a graph can explain besides the next token."""

import pytest
import torch

import fasttc
from fasttc.attribution import Direction, Feature, Logit, LogitDifference
from fasttc.models import float64_exact
from fasttc.models.linear import unembedding


@pytest.fixture
def world(tiny_model, random_set, prompt_ids):
    model = tiny_model("gemma2", dtype=torch.float64)
    with float64_exact(model):
        yield model, random_set(model, skip=True, n_features=24), prompt_ids


def logit_rows(graph):
    return graph.dense()[graph.logit_slice]


def test_default_takes_the_fewest_tokens_that_reach_the_probability(world):
    model, tcs, ids = world
    probs = torch.softmax(model(ids[None]).logits[0, -1], 0).detach().sort(descending=True)
    for share, most in ((0.5, 10), (0.3, 10), (0.99, 4), (1e-6, 10)):
        graph = fasttc.attribute(model, tcs, ids, logit_prob=share, max_logits=most)
        count = min(most, int((probs.values.cumsum(0) < share).sum()) + 1)
        assert graph.logit_ids.tolist() == probs.indices[:count].tolist()
        torch.testing.assert_close(graph.logit_probs, probs.values[:count], rtol=1e-12, atol=0)


def test_given_tokens_keep_their_order_and_probabilities(world):
    model, tcs, ids = world
    graph = fasttc.attribute(model, tcs, ids, targets=[40, 7])
    probs = torch.softmax(model(ids[None]).logits[0, -1], 0).detach()
    assert graph.logit_ids.tolist() == [40, 7]
    torch.testing.assert_close(graph.logit_probs, probs[[40, 7]])
    again = fasttc.attribute(model, tcs, ids, targets=torch.tensor([40, 7]))
    assert torch.equal(again.values, graph.values)


def test_words_need_a_tokenizer_and_must_be_one_token(world, tiny_tokenizer):
    model, tcs, ids = world
    graph = fasttc.attribute(model, tcs, ids, targets=["t40"], tokenizer=tiny_tokenizer)
    assert graph.logit_ids.tolist() == [40]
    assert graph.logit_labels == [" t40"]
    apart = fasttc.attribute(
        model, tcs, ids, targets=[LogitDifference("t40", "t7")], tokenizer=tiny_tokenizer
    )
    assert apart.logit_labels == ["t40 - t7"]
    with pytest.raises(ValueError, match=r"'t40'.*tokenizer"):
        fasttc.attribute(model, tcs, ids, targets=["t40"])
    with pytest.raises(ValueError, match="single token, got 2"):
        fasttc.attribute(model, tcs, ids, targets=["t40 t41"], tokenizer=tiny_tokenizer)


def test_difference_is_the_difference_of_the_rows(world):
    model, tcs, ids = world
    difference = fasttc.attribute(model, tcs, ids, targets=[LogitDifference(40, 7)])
    both = fasttc.attribute(model, tcs, ids, targets=[40, 7])
    rows = logit_rows(both)
    torch.testing.assert_close(logit_rows(difference)[0, :-1], rows[0, :-2] - rows[1, :-2])
    assert difference.logit_ids.tolist() == [61]  # beyond the vocabulary
    assert difference.logit_labels == ["40 - 7"]
    assert difference.logit_probs.tolist() == [1.0]


def test_direction_at_the_end_is_a_logit(world):
    model, tcs, ids = world
    rows = unembedding(model)
    direction = Direction(rows.weight[40] - rows.mean, weight=0.25, label="forty")
    graph = fasttc.attribute(model, tcs, ids, targets=[direction, Logit(40, weight=0.5)])
    torch.testing.assert_close(*logit_rows(graph), rtol=0, atol=1e-12)
    assert graph.logit_labels == ["forty", "40"]
    assert graph.logit_probs.tolist() == [0.25, 0.5]


def test_earlier_positions_see_only_what_precedes_them(world):
    model, tcs, ids = world
    graph = fasttc.attribute(model, tcs, ids, targets=[Logit(40, position=4)])
    shorter = fasttc.attribute(model, tcs, ids[:5], targets=[40])
    assert int(graph.features[:, 1].max()) == 4  # nothing later can matter, so nothing later is a node
    assert torch.equal(graph.features, shorter.features)
    torch.testing.assert_close(
        logit_rows(graph)[0, : graph.n_features], logit_rows(shorter)[0, : graph.n_features]
    )
    torch.testing.assert_close(graph.logit_probs, shorter.logit_probs)
    assert graph.metadata["target_positions"] == [4]


def test_residual_after_a_layer(world, oracle):
    model, tcs, ids = world
    vector = torch.randn(32, dtype=torch.float64)
    graph = fasttc.attribute(model, tcs, ids, targets=[Direction(vector, layer=1, position=-2)])
    assert int(graph.features[:, 0].max()) == 1
    frozen = oracle(model, tcs, ids)
    entry = frozen.entry.clone().requires_grad_()
    written = [value.clone().requires_grad_() for value in frozen.constants()]
    seen = []
    block = model.get_submodule(frozen.parts.layers[1].block)
    handle = block.register_forward_hook(lambda *args: seen.append(args[-1]))
    frozen.run(entry, written)
    handle.remove()
    resid = seen[0] if seen[0].ndim == 3 else seen[0][0]
    grads = torch.autograd.grad(resid[0, -2] @ vector, [entry, *written[:2]])
    layer, position, index = graph.features.T
    decoders = torch.stack([tcs[a].W_dec[b] for a, b in zip(layer.tolist(), index.tolist(), strict=True)])
    expected = (torch.stack(grads[1:])[layer, position] * decoders).sum(-1) * graph.activations
    row = logit_rows(graph)[0]
    torch.testing.assert_close(row[: graph.n_features], expected.detach(), rtol=0, atol=1e-12)
    tokens = (grads[0] * frozen.tokens).sum(-1)
    torch.testing.assert_close(row[graph.token_slice], tokens.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox"])
def test_feature_as_target_has_the_row_of_its_node(family, tiny_model, random_set, prompt_ids):
    model = tiny_model(family, dtype=torch.float64)
    tcs = random_set(model, n_features=24)
    whole = fasttc.attribute(model, tcs, prompt_ids)
    node = int((whole.features[:, 0] == 2).nonzero()[-1])
    layer, position, index = whole.features[node].tolist()
    graph = fasttc.attribute(model, tcs, prompt_ids, targets=[Feature(layer, position, index)])
    assert graph.logit_labels == [f"feature {layer}/{position}/{index}"]
    assert int(graph.features[:, 0].max()) < layer
    below = whole.features[:, 0] < layer
    assert torch.equal(graph.features, whole.features[below & (whole.features[:, 1] <= position)])
    columns = [int((whole.features == feature).all(1).nonzero()) for feature in graph.features]
    expected = whole.dense()[node]
    row = logit_rows(graph)[0]
    torch.testing.assert_close(row[: graph.n_features], expected[columns], rtol=0, atol=1e-12)
    torch.testing.assert_close(row[graph.token_slice], expected[whole.token_slice], rtol=0, atol=1e-12)


def test_targets_of_all_kinds_in_one_graph(world):
    model, tcs, ids = world
    wanted = [
        Logit(40),
        Feature(1, 5, 3),
        Direction(torch.ones(32), layer=0, position=2),
        LogitDifference(3, 4, position=6),
    ]
    together = fasttc.attribute(model, tcs, ids, targets=wanted)
    assert together.logit_ids.tolist() == [40, 62, 63, 64]
    for number, target in enumerate(wanted):
        alone = fasttc.attribute(model, tcs, ids, targets=[target])
        columns = [int((together.features == feature).all(1).nonzero()) for feature in alone.features]
        row = logit_rows(together)[number]
        rest = torch.ones(together.n_features, dtype=torch.bool)
        rest[columns] = False
        torch.testing.assert_close(row[columns], logit_rows(alone)[0, : alone.n_features], rtol=0, atol=1e-12)
        assert not bool(row[: together.n_features][rest].any())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (61, r"target token: expected an int in \[0, 61\), got 61"),
        (-1, r"target token: expected an int in \[0, 61\), got -1"),
        (Logit(4, position=9), r"position: expected an int in \[-9, 9\).*got 9"),
        (Feature(3, 2, 0), r"Feature.layer: expected an int in \[0, 3\), got 3"),
        (Feature(1, 12, 0), r"position: expected an int in \[-9, 9\).*got 12"),
        (Feature(1, 2, 24), r"Feature.index: expected an int in \[0, 24\), got 24"),
        (Direction(torch.zeros(31)), "expected 32 finite numbers"),
        (Direction(torch.full((32,), torch.nan)), "expected 32 finite numbers"),
        (Direction(torch.zeros(32), layer=3), r"Direction.layer: expected an int in \[0, 3\), got 3"),
    ],
)
def test_targets_that_do_not_exist(world, target, message):
    model, tcs, ids = world
    with pytest.raises(ValueError, match=message):
        fasttc.attribute(model, tcs, ids, targets=[target])


def test_other_bad_targets(world):
    model, tcs, ids = world
    with pytest.raises(TypeError, match=r"targets: expected token ids.*got float"):
        fasttc.attribute(model, tcs, ids, targets=[1.5])
    with pytest.raises(ValueError, match="at least one, got none"):
        fasttc.attribute(model, tcs, ids, targets=[])
    with pytest.raises(ValueError, match="max_logits: expected a positive int, got 0"):
        fasttc.attribute(model, tcs, ids, max_logits=0)
    with pytest.raises(ValueError, match=r"logit_prob: expected a number in \(0, 1\], got 1.5"):
        fasttc.attribute(model, tcs, ids, logit_prob=1.5)
