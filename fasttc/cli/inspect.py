"""``fasttc inspect``: what a file or folder holds."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import Run, table, verb


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@verb
def command(run: Run, path: Path) -> None:
    """Say what PATH holds: a set of transcoders or adapters, an attribution graph, or a model."""
    if not path.exists():
        raise ValueError(f"expected a file or folder, {path} does not exist")
    result, text = _describe(path)
    run.finish({"path": str(path), **result}, text)


def _describe(path: Path) -> tuple[dict[str, Any], str]:
    if path.is_file():
        return _describe_graph(path)
    from fasttc.formats import sniff

    try:
        kind = sniff(path)
    except ValueError as error:
        if (path / "config.json").is_file():
            return _describe_model(path)
        raise ValueError(f"expected a transcoder set, a graph file or a model folder: {error}") from error
    return _describe_transcoders(path, kind)


def _describe_graph(path: Path) -> tuple[dict[str, Any], str]:
    from fasttc.graph import MergedGraph, PrunedGraph, load_graph

    found = load_graph(path)
    loaded = found.pruned if isinstance(found, MergedGraph) else found
    pruned = isinstance(loaded, PrunedGraph)
    graph = loaded.graph if pruned else loaded
    scores = loaded.full_scores if pruned else graph.scores()
    rows = [
        {"target": label, "id": token, "probability": probability}
        for label, token, probability in zip(
            graph.logit_labels, graph.logit_ids.tolist(), graph.logit_probs.tolist(), strict=True
        )
    ]
    result = {
        "kind": "merged graph" if found is not loaded else "pruned graph" if pruned else "graph",
        "prompt": graph.prompt,
        "layers": graph.n_layers,
        "features": graph.n_features,
        "tokens": graph.n_tokens,
        "nodes": graph.n_nodes,
        "edges": graph.n_edges,
        "targets": rows,
        "scores": scores._asdict(),
        "metadata": graph.metadata,
    }
    named = ", ".join(f"{name} {value:.4f}" for name, value in scores._asdict().items())
    return result, f"{found!r}\nprompt: {graph.prompt!r}\n{named}\n{table(rows)}"


def _describe_transcoders(path: Path, kind: str) -> tuple[dict[str, Any], str]:
    from fasttc.formats import AdapterSet, TranscoderSet
    from fasttc.nn import io

    held = io.kind_of(path)
    tcs = (AdapterSet if held == "adapters" else TranscoderSet).from_pretrained(path)
    rows = []
    for site, transcoder in zip(tcs.sites, tcs, strict=True):
        cfg = transcoder.config
        row = {
            "layer": site.layer,
            "D": cfg.d_in,
            "F": cfg.n_features,
            "activation": cfg.activation,
            "k": cfg.k,
        }
        rows.append(
            {**row, "skip": str(cfg.skip), "x": site.x, "y": site.y, "dtype": str(transcoder.W_enc.dtype)}
        )
    parameters = sum(p.numel() for transcoder in tcs for p in transcoder.parameters())
    result = {"kind": held, "format": kind, "layers": rows, "parameters": parameters}
    return (
        {**result, "metadata": tcs.metadata},
        f"{held.removesuffix('s')} set, format {kind}, {len(tcs)} layers, {parameters:,} parameters\n{table(rows)}",
    )


def _describe_model(path: Path) -> tuple[dict[str, Any], str]:
    from fasttc import models

    model, tokenizer = models.load(path)
    parts = models.anatomy(model)
    feed_forward = set(models.ffn_parameters(model))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    result = {
        "kind": "model",
        "family": parts.family,
        "layers": parts.n_layers,
        "D": parts.d_model,
        "heads": parts.n_heads,
        "vocabulary": parts.vocab_size,
        "parameters": sum(sizes.values()),
        "feed_forward_parameters": sum(size for name, size in sizes.items() if name in feed_forward),
        "tokenizer": tokenizer is not None,
    }
    return result, "\n".join(f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in result.items())


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
