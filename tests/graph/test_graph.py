"""What a graph holds, and what it refuses."""

import pytest
import torch

import fasttc
from fasttc.graph import ERROR, FEATURE, KINDS, LOGIT, TOKEN, Graph


def test_numbers_nodes_in_canonical_order(by_hand):
    graph = by_hand()
    assert (graph.n_layers, graph.n_features, graph.n_errors, graph.n_tokens, graph.n_logits) == (
        2,
        2,
        4,
        2,
        1,
    )
    assert (graph.n_nodes, graph.n_edges) == (9, 7)
    assert graph.node_kind.tolist() == [FEATURE] * 2 + [ERROR] * 4 + [TOKEN] * 2 + [LOGIT]
    assert [KINDS[kind] for kind in (FEATURE, ERROR, TOKEN, LOGIT)] == ["feature", "error", "token", "logit"]
    assert graph.node_layer.tolist() == [0, 1, 0, 0, 1, 1, -1, -1, 2]
    assert graph.node_position.tolist() == [1, 1, 0, 1, 0, 1, 0, 1, 1]
    places = [graph.feature_slice, graph.error_slice, graph.token_slice, graph.logit_slice]
    assert places == [slice(0, 2), slice(2, 6), slice(6, 8), slice(8, 9)]
    assert graph.row_blocks == [(8, 9), (1, 2), (0, 1)]
    assert repr(graph) == "Graph(2 features, 4 errors, 2 tokens, 1 logits, 7 edges, 2 layers)"


def test_stores_rows_as_targets_with_ascending_sources(by_hand):
    graph = by_hand()
    assert graph.row_ptr.tolist() == [0, 2, 5, 5, 5, 5, 5, 5, 5, 7]
    assert graph.columns.tolist() == [6, 7, 0, 3, 7, 0, 1]
    assert graph.values.tolist() == [-1, 3, 2, -1, 1, -1, 3]
    assert graph.columns.dtype == torch.int32
    assert graph.row_mass().tolist() == [4, 4, 0, 0, 0, 0, 0, 0, 4]


def test_is_public_under_the_package_name():
    assert fasttc.Graph is Graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_and_back(random_case, dtype):
    case = random_case(3, dtype)
    graph = Graph.from_dense(**case)
    assert graph.values.dtype == dtype
    assert torch.equal(graph.dense(), case["adjacency"])
    assert graph.remainder.tolist() == [0.0] * graph.n_nodes


def test_half_precision_is_widened(by_hand):
    adjacency = by_hand().dense().to(torch.bfloat16)
    graph = by_hand(adjacency=adjacency, logit_probs=torch.tensor([0.5], dtype=torch.bfloat16))
    assert graph.values.dtype == graph.logit_probs.dtype == torch.float32


def test_takes_lists_and_names_tokens_by_id(by_hand):
    graph = by_hand(
        features=[[0, 1, 5], [1, 1, 7]], activations=[1.0, 2.0], input_ids=[11, 12], logit_ids=[42]
    )
    assert graph.tokens == ["11", "12"]
    assert graph.logit_labels == ["42"]
    assert (graph.prompt, graph.metadata) == ("", {})
    named = by_hand(tokens=["a", "b"], logit_labels=["c"], prompt="a b", metadata={"model": "m"})
    assert (named.tokens, named.logit_labels, named.prompt, named.metadata) == (
        ["a", "b"],
        ["c"],
        "a b",
        {"model": "m"},
    )


def test_a_graph_without_features_is_a_graph(by_hand):
    adjacency = torch.zeros(7, 7)
    adjacency[6, 4] = 1.0
    graph = by_hand(
        adjacency=adjacency, features=torch.zeros(0, 3, dtype=torch.int64), activations=torch.zeros(0)
    )
    assert graph.influence().tolist() == [0, 0, 0, 0, 0.5, 0, 0]
    assert graph.prune().n_edges == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"adjacency": torch.zeros(9, 8)}, r"adjacency: expected \[nodes, nodes\], got \[9, 8\]"),
        (
            {"adjacency": torch.zeros(10, 10)},
            r"2 features \+ 2 x 2 errors \+ 2 tokens \+ 1 logits = 9 nodes, got 10",
        ),
        ({"n_layers": 3}, r"= 11 nodes, got 9"),
        ({"features": torch.tensor([[0, 1], [1, 1]])}, r"features: expected \[n, 3\], got shape \[2, 2\]"),
        ({"features": torch.tensor([[1, 1, 7], [0, 1, 5]])}, "ascending without duplicates"),
        ({"features": torch.tensor([[0, 1, 5], [0, 1, 5]])}, "ascending without duplicates"),
        ({"features": torch.tensor([[0, 1, 5], [2, 1, 7]])}, "layers below 2, positions below 2"),
        ({"features": torch.tensor([[0, 2, 5], [1, 1, 7]])}, "layers below 2, positions below 2"),
        ({"features": torch.tensor([[0, 1, -5], [1, 1, 7]])}, "numbers >= 0"),
        ({"activations": torch.zeros(3)}, "activations: expected 2 entries, got 3"),
        (
            {"activations": torch.tensor([1.0, torch.nan])},
            "activations: expected finite numbers, got 1 NaN or infinite",
        ),
        ({"logit_probs": torch.tensor([0.5, 0.1])}, "logit_probs: expected 1 entries, got 2"),
        ({"logit_probs": torch.tensor([-0.5])}, "logit_probs: expected weights >= 0"),
        ({"logit_probs": torch.tensor([0.0])}, "sum > 0"),
        ({"tokens": ["a"]}, "tokens: expected 2 strings, got 1"),
        ({"logit_labels": ["a", "b"]}, "logit_labels: expected 1 strings, got 2"),
        ({"remainder": torch.zeros(3)}, "remainder: expected 9 entries, got 3"),
        ({"remainder": -torch.ones(9)}, "remainder: expected numbers >= 0, got -1"),
        ({"remainder": torch.ones(9)}, "remainder: expected 0 for errors and tokens"),
    ],
)
def test_refuses_what_is_not_a_graph(by_hand, changed, message):
    with pytest.raises(ValueError, match=message):
        by_hand(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": torch.zeros(2, 3)}, "features: expected integers, got torch.float32"),
        ({"tokens": "ab"}, "tokens: expected a list of strings, got one string"),
        ({"tokens": ["a", 1]}, "tokens: expected a list of strings"),
        ({"prompt": 3}, "prompt: expected a string, got int"),
        ({"metadata": "m"}, "metadata: expected a dict, got str"),
    ],
)
def test_refuses_other_types(by_hand, changed, message):
    with pytest.raises(TypeError, match=message):
        by_hand(**changed)


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (3, 6, "edges: expected none into errors and tokens"),
        (6, 7, "edges: expected none into errors and tokens"),
        (0, 1, "got an edge into layer 0 from layer 1"),
        (1, 1, "got an edge into layer 1 from layer 1"),
        (0, 3, "got an edge into layer 0 from layer 0"),
        (8, 8, "got an edge into layer 2 from layer 2"),
    ],
)
def test_refuses_edges_that_do_not_run_upwards(by_hand, target, source, message):
    adjacency = by_hand().dense()
    adjacency[target, source] = 1.0
    with pytest.raises(ValueError, match=message):
        by_hand(adjacency=adjacency)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_refuses_edges_that_are_not_numbers(by_hand, bad):
    adjacency = by_hand().dense()
    adjacency[8, 0] = bad
    with pytest.raises(ValueError, match="values: expected finite numbers, got 1 NaN or infinite"):
        by_hand(adjacency=adjacency)


def test_accepts_edges_whose_sum_overflows(by_hand):
    adjacency = by_hand().dense()
    adjacency[8, 0] = adjacency[8, 1] = 1.7e308
    assert by_hand(adjacency=adjacency).n_edges == 7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"row_ptr": torch.zeros(4, dtype=torch.int64)}, "row_ptr: expected 10 entries, got 4"),
        (
            {"row_ptr": torch.tensor([0, 2, 5, 5, 5, 5, 5, 5, 5, 6])},
            "row_ptr: expected to rise from 0 to 7, got 0 to 6",
        ),
        ({"row_ptr": torch.tensor([0, 5, 2, 5, 5, 5, 5, 5, 5, 7])}, "with falls between"),
        ({"columns": torch.tensor([6, 7, 0])}, "columns: expected 7 entries, got 3"),
        (
            {"columns": torch.tensor([6, 9, 0, 3, 7, 0, 1])},
            "columns: expected node numbers below 9, got 6 to 9",
        ),
        (
            {"columns": torch.tensor([6, 7, 0, 3, 7, -1, 1])},
            "columns: expected node numbers below 9, got -1 to 1",
        ),
        (
            {"columns": torch.tensor([7, 6, 0, 3, 7, 0, 1])},
            "columns: expected ascending numbers within each row",
        ),
        (
            {"columns": torch.tensor([6, 7, 0, 3, 7, 1, 1])},
            "columns: expected ascending numbers within each row",
        ),
        ({"values": torch.zeros(7, 1)}, r"values: expected one dimension, got shape \[7, 1\]"),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 18, 1])
def test_refuses_broken_rows(by_hand, monkeypatch, changed, message, chunk):
    graph = by_hand()
    monkeypatch.setattr("fasttc.graph.influence.EDGES_PER_CHUNK", chunk)
    given = {name: getattr(graph, name) for name in Graph.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        Graph(**{**given, **changed})


@pytest.mark.parametrize(("layers", "tokens", "logits"), [(0, 2, 1), (2, 0, 1), (2, 2, 0)])
def test_needs_a_layer_a_token_and_a_logit(layers, tokens, logits):
    nodes = layers * tokens + tokens + logits
    with pytest.raises(ValueError, match="at least one layer, one token and one logit"):
        Graph.from_dense(
            torch.zeros(nodes, nodes),
            features=torch.zeros(0, 3, dtype=torch.int64),
            activations=torch.zeros(0),
            input_ids=torch.arange(tokens),
            logit_ids=torch.arange(logits),
            logit_probs=torch.ones(logits),
            n_layers=layers,
        )
