"""Edges by head: parts add up, and each is what is left when the heads below it are cut off."""

import pytest
import torch

import fasttc
from fasttc.attribution import LogitDifference, split_by_head
from fasttc.models import float64_exact


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_parts_add_up_to_the_edge(family, skip, tiny_model, random_set, prompt_ids):
    model = tiny_model(family, dtype=torch.float64)
    tcs = random_set(model, skip=skip, n_features=16)
    with float64_exact(model):
        graph = fasttc.attribute(model, tcs, prompt_ids)
        chosen = [graph.n_features - 1, graph.n_features // 2, graph.logit_slice.start]
        split = split_by_head(model, tcs, graph, targets=chosen)
    edges = graph.dense()[split.edges[:, 0], split.edges[:, 1]]
    torch.testing.assert_close(split.total(), edges, rtol=0, atol=1e-11)
    assert len(edges) > 50
    # No head, no move: what is not at the target's own position passes one.
    moved = graph.node_position[split.edges[:, 0]] != graph.node_position[split.edges[:, 1]]
    assert float(split.direct[moved].abs().max()) == 0
    assert float(split.direct[~moved].abs().max()) > 1e-6
    # Heads at or below the source's layer cannot read it.
    for edge in range(0, len(edges), 7):
        layer = int(graph.node_layer[split.edges[edge, 1]])
        assert float(split.heads[edge, : layer + 1].abs().sum()) == 0
    assert float((split.heads != 0).double().mean()) > 0.05


def test_a_part_is_what_other_first_readers_leave(tiny_model, random_set, prompt_ids):
    """With all heads of the layers below cut off at their outputs, the lowest head left reads everything first."""
    model = tiny_model("llama", dtype=torch.float64)
    tcs = random_set(model, n_features=16)
    with float64_exact(model):
        graph = fasttc.attribute(model, tcs, prompt_ids)
        token = graph.token_slice.start + 2
        target = graph.logit_slice.start
        split = split_by_head(model, tcs, graph, [(target, token)])
        from fasttc.attribution.owners import Owners
        from fasttc.attribution.targets import Resolver
        from fasttc.models.linear import layer_weights, unembedding

        frozen, sources, linear = Owners(tcs).read(
            model, prompt_ids, torch.float64, layer_weights(model, dtype=torch.float64)
        )
        resolver = Resolver(linear, sources, frozen.final, unembedding(model), None)
        root = resolver.roots([int(graph.logit_ids[0])], 1, 1.0)[0]
        for number in range(3):
            for head in range(4):
                # Upwards by hand: untouched to the layer, through this head alone, then through everything above.
                start = torch.zeros(9, 1, 32, dtype=torch.float64)
                start[2, 0] = sources.embedding[2]
                layer = linear.layers[number]
                value = start[:, 0] @ layer.value[head // 2].T
                resid = (layer.pattern[head] @ value @ layer.output[head].T)[:, None]
                for above in linear.layers[number + 1 :]:
                    resid = resid + above.attention_jvp(resid)
                expected = resid[-1, 0] @ root.vector
                assert split.heads[0, number, head] == pytest.approx(float(expected), abs=1e-12)
    best = split.strongest(0, 2)
    assert abs(best[0][2]) == float(split.heads[0].abs().max())
    assert split.heads[0, best[1][0], best[1][1]] == best[1][2]


def test_bad_input(tiny_model, random_set, prompt_ids):
    model = tiny_model("qwen3")
    tcs = random_set(model, n_features=16)
    graph = fasttc.attribute(model, tcs, prompt_ids, targets=[5, LogitDifference(4, 7)])
    last, token = graph.n_nodes - 1, graph.token_slice.start

    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            split_by_head(model, tcs, graph, **options)

    refused("exactly one of edges and targets")
    refused("exactly one of edges and targets", edges=[(1, 0)], targets=[1])
    refused(
        rf"edges: expected nodes in \[0, {graph.n_nodes}\), got 3 to {graph.n_nodes}", edges=[(last + 1, 3)]
    )
    refused(r"targets: expected nodes in", targets=[-1])
    refused("expected a target that is a token, got '4 - 7'", edges=[(last, 0)])
    refused("which has no inputs", edges=[(token, 0)])
    refused("got logit node", edges=[(last - 1, last)])
    other = random_set(model, n_features=16)
    with pytest.raises(ValueError, match="to be active on its prompt, it is not"):
        split_by_head(model, other, graph, targets=[last - 1])
    assert split_by_head(model, tcs, graph, targets=[]).total().shape == (0,)
