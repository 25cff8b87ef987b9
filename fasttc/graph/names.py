"""Nodes in words, for tables and paths."""

from fasttc.graph.graph import Graph


def node_names(graph: Graph) -> list[str]:
    """A name for each node: ``L1/204@4 knee-rash`` for a feature, ``error L1@4 knee-rash``, ``'knee-rash'@4`` for a
    token, ``say babanol`` for a logit. Tokens are data and come as they are, without blanks around them."""
    words = [token.strip() or repr(token) for token in graph.tokens]
    features = [f"L{layer}/{index}@{at} {words[at]}" for layer, at, index in graph.features.tolist()]
    errors = [
        f"error L{layer}@{at} {words[at]}" for layer in range(graph.n_layers) for at in range(graph.n_tokens)
    ]
    tokens = [f"'{word}'@{at}" for at, word in enumerate(words)]
    return (
        features + errors + tokens + [f"say {label.strip() or repr(label)}" for label in graph.logit_labels]
    )
