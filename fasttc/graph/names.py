"""Nodes in words, for tables and paths."""

from fasttc.graph.graph import Graph


def feature_numbers(graph: Graph) -> list[str]:
    """Each feature's number in its own set: ``204``, and ``A17`` for an adapter's feature 17."""
    first = graph.metadata.get("adapters_from", [0] * graph.n_layers)
    return [
        f"A{index - first[layer]}" if owned else str(index)
        for (layer, _, index), owned in zip(graph.features.tolist(), graph.from_adapter.tolist(), strict=True)
    ]


def node_names(graph: Graph) -> list[str]:
    """A name for each node: ``L1/204@4 knee-rash`` for a feature, ``L1/A17@4 knee-rash`` for the adapter's feature 17,
    ``error L1@4 knee-rash``, ``'knee-rash'@4`` for a token, ``say babanol`` for a logit. Tokens are data and come as
    they are, without blanks around them."""
    words = [token.strip() or repr(token) for token in graph.tokens]
    features = [
        f"L{layer}/{number}@{at} {words[at]}"
        for (layer, at, _), number in zip(graph.features.tolist(), feature_numbers(graph), strict=True)
    ]
    errors = [
        f"error L{layer}@{at} {words[at]}" for layer in range(graph.n_layers) for at in range(graph.n_tokens)
    ]
    tokens = [
        f"'{token.strip()}'@{at}" if token.strip() else f"{token!r}@{at}"
        for at, token in enumerate(graph.tokens)
    ]
    return (
        features + errors + tokens + [f"say {label.strip() or repr(label)}" for label in graph.logit_labels]
    )
