"""What else than edges says that two features of a graph are alike, for ``fasttc graph merge``."""

from typing import Any

from fasttc.cli._common import Run, load_model, load_transcoders


def merge_evidence(
    run: Run,
    graph: Any,
    transcoders: str | None,
    model: str | None,
    data: str | None,
    options: dict[str, Any],
) -> list[Any]:
    """Arrays with a row for each feature of the graph: encoder, decoder and, with a model and data, activations.

    Raises:
        ValueError: a model, data or transcoders that are of no use alone; transcoders of other features.
    """
    if (model is None) != (data is None) or (model is not None and transcoders is None):
        raise ValueError("--model, --data: expected both, and --transcoders, to see what fires together")
    if transcoders is None or not graph.n_features:
        return []
    tcs = load_transcoders(run, transcoders)
    found = _rows(tcs, graph)
    if model is not None:
        import numpy as np

        from fasttc.analysis import feature_activations

        language_model, tokenizer = load_model(run, model)
        features = graph.features[:, [0, 2]].numpy()
        unique, number = np.unique(features, axis=0, return_inverse=True)
        fired = feature_activations(
            language_model, tcs, data, [(int(layer), int(index)) for layer, index in unique],
            tokenizer=tokenizer, **options,
        )  # fmt: skip
        found.append(fired[number.ravel()])
    return found


def _rows(tcs: Any, graph: Any) -> list[Any]:
    """Encoder and decoder rows of the graph's features."""
    place = {layer: at for at, layer in enumerate(tcs.layers)}
    rows: dict[str, list[Any]] = {"W_enc": [], "W_dec": []}
    for layer, _, index in graph.features.tolist():
        if layer not in place or index >= tcs[place[layer]].n_features:
            raise ValueError(
                f"--transcoders: expected the set of this graph, it has no feature {index} in layer {layer}"
            )
        for name, found in rows.items():
            found.append(getattr(tcs[place[layer]], name)[index].detach().float().cpu().numpy())
    return list(rows.values())
