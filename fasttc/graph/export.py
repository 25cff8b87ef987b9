"""Graphs as the JSON that circuit-tracer's and Neuronpedia's viewers read.

Node ids are circuit-tracer's: feature ``layer_index_position``, error ``0_layer_position``, token
``E_vocabulary_position``, logit ``<layers + 1>_vocabulary_position``. Its error ids can coincide with those of layer-0
features. Everywhere else in this package an error is therefore ``0_layer_position_error``, whatever features a graph
has (:func:`node_ids`); in the JSON of viewers it has that ending only beside a feature of the shorter id. Ids are
unique in every file.

Tokens and labels are data from elsewhere. They are written as JSON strings with everything but plain ASCII escaped, and
``<`` too, so that no string can end a script element should a page embed the file.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttc import __version__
from fasttc._files import atomic_file, read_json
from fasttc.graph.graph import Graph
from fasttc.graph.pruned import PrunedGraph

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_INDEX = "graph-metadata.json"
_ERROR = "_error"

Labels = Mapping[tuple[int, int] | str, str]


def node_ids(graph: Graph, node_mask: Tensor | None = None) -> list[str]:
    """Ids of the nodes in ``node_mask`` (all by default), in node order, without duplicates.

    An id says what the node is and does not depend on what else is in the graph: it names the same node in every graph
    of the prompt, whole or pruned, of the base or of the fine-tuned model. A second logit of the same token has ``_2``
    at its end, and so on.
    """
    features = [f"{layer}_{index}_{position}" for layer, position, index in graph.features.tolist()]
    errors = [
        f"0_{layer}_{position}{_ERROR}"
        for layer in range(graph.n_layers)
        for position in range(graph.n_tokens)
    ]
    tokens = [f"E_{token}_{position}" for position, token in enumerate(graph.input_ids.tolist())]
    logits, copies = [], Counter[int]()
    for token in graph.logit_ids.tolist():
        copies[token] += 1
        again = f"_{copies[token]}" if copies[token] > 1 else ""
        logits.append(f"{graph.n_layers + 1}_{token}_{graph.n_tokens - 1}{again}")
    names = features + errors + tokens + logits
    return names if node_mask is None else [names[node] for node in node_mask.nonzero().squeeze(1).tolist()]


def _viewer_ids(ids: list[str]) -> dict[str, str]:
    """circuit-tracer's id of each id in a file: errors without their ending where no feature has the shorter one."""
    taken = set(ids)
    return {own: own if (short := own.removesuffix(_ERROR)) in taken else short for own in ids}


def _viewer_state(q_params: Mapping[str, Any], ids: Mapping[str, str]) -> dict[str, Any]:
    """The viewer's state with the ids of the file; nodes that it does not hold are left out, and groups of none."""
    state = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": "", **q_params}
    groups = [
        [name, *(ids[own] for own in members if own in ids)] for name, *members in state["supernodes"] or []
    ]
    return {
        **state,
        "pinnedIds": [ids[own] for own in state["pinnedIds"] or [] if own in ids],
        "supernodes": [group for group in groups if len(group) > 1],
    }


def feature_number(layer: int, index: int) -> int:
    """A feature's number in graph files and the name of its feature file: Cantor's pairing of layer and index."""
    pair = layer + index
    return pair * (pair + 1) // 2 + index


def _numbers(tensor: Tensor) -> list[float]:
    """Python floats; float32 ones with the fewest digits that give the same float32 back."""
    if tensor.dtype == torch.float64:
        return tensor.tolist()
    return [float(str(number)) for number in tensor.float().numpy()]


def _node(node_id: str, layer: str, position: int, kind: str, js_id: str) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "feature": -1,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js_id,
        "clerp": "",
        "influence": None,
        "activation": None,
    }


def _nodes(pruned: PrunedGraph, ids: Mapping[str, str], labels: Labels) -> list[dict[str, Any]]:
    graph = pruned.graph
    activations, probabilities = _numbers(graph.activations), _numbers(graph.logit_probs)
    cumulative = _numbers(pruned.cumulative.float())
    nodes, owners = [], graph.owners
    for (own, node_id), node in zip(ids.items(), pruned.node_mask.nonzero().squeeze(1).tolist(), strict=True):
        position = int(graph.node_position[node])
        if node < graph.error_slice.start:
            layer, _, index = graph.features[node].tolist()
            entry = _node(node_id, str(layer), position, "cross layer transcoder", f"{layer}_{index}-0")
            entry["feature"] = feature_number(layer, index)
            entry["clerp"] = labels.get((layer, index), "")
            entry["activation"] = activations[node]
            if owners:
                entry["owner"] = owners[node]
        elif node < graph.token_slice.start:
            layer = int(graph.node_layer[node])
            entry = _node(node_id, str(layer), position, "mlp reconstruction error", f"{layer}_{position}-0")
        elif node < graph.logit_slice.start:
            token = int(graph.input_ids[position])
            entry = _node(node_id, "E", position, "embedding", f"E_{token}-{position}")
            entry["feature"] = position
        else:
            at = node - graph.logit_slice.start
            token = int(graph.logit_ids[at])
            entry = _node(node_id, str(graph.n_layers + 1), position, "logit", f"L_{token}-{position}")
            entry["feature"] = token
            entry["token_prob"] = probabilities[at]
            entry["is_target_logit"] = at == 0
            entry["clerp"] = f'Output "{graph.logit_labels[at]}" (p={probabilities[at]:.3f})'
        if node < graph.logit_slice.start:
            entry["influence"] = cumulative[node]
            entry["clerp"] = labels.get(own, entry["clerp"])
        nodes.append(entry)
    return nodes


def _links(pruned: PrunedGraph, ids: list[str]) -> list[dict[str, Any]]:
    targets, sources, weights = pruned.edges()
    number = (pruned.node_mask.cumsum(0) - 1).to(torch.int64)
    return [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(
            number[sources].tolist(), number[targets].tolist(), _numbers(weights), strict=True
        )
    ]


def _checked_slug(slug: str) -> str:
    if not isinstance(slug, str) or not _SLUG.fullmatch(slug):
        raise ValueError(
            f"slug: expected letters, digits, '.', '_' and '-' (it names the file), got {slug!r}"
        )
    return slug


def _metadata(
    pruned: PrunedGraph, slug: str, scan: str | None, transcoders: Sequence[str] | None
) -> dict[str, Any]:
    graph = pruned.graph
    if scan is None:
        scan = str(graph.metadata.get("model", ""))
    if transcoders is None:
        named = graph.metadata.get("transcoders", [])
        transcoders = [named] if isinstance(named, str) else [str(name) for name in named or []]
    shares = {"node_threshold": pruned.node_threshold, "edge_threshold": pruned.edge_threshold}
    own = {name: graph.metadata[name] for name in ("adapters_from",) if name in graph.metadata}
    return {
        "slug": slug,
        "scan": scan,
        "transcoder_list": list(transcoders),
        "prompt_tokens": graph.tokens,
        "prompt": graph.prompt,
        "node_threshold": pruned.node_threshold,
        "schema_version": 1,
        "info": {"generator": {"name": "fasttc", "version": __version__}},
        "pruning_settings": shares,
        **own,
    }


def graph_json(
    graph: Graph | PrunedGraph,
    *,
    slug: str,
    scan: str | None = None,
    transcoders: Sequence[str] | None = None,
    labels: Labels | None = None,
    q_params: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The kept nodes and edges as circuit-tracer's / Neuronpedia's JSON object.

    Args:
        graph: a pruned graph, or a graph, which is pruned at 0.8 / 0.98.
        slug: short name of the graph; also its file's name.
        scan: what the viewers call the model; ``graph.metadata["model"]`` by default.
        transcoders: names of the transcoder sets; ``graph.metadata["transcoders"]`` by default.
        labels: text for features by (layer, index), and for single nodes by their :func:`node_ids`, written as
            ``clerp``; outputs keep their own, of token and probability.
        q_params: viewer state that replaces the empty defaults (``pinnedIds``, ``supernodes``, ...), nodes by their
            :func:`node_ids`. Those that are not in the file are left out.
        metadata: more entries for ``metadata``, such as ``feature_details`` or ``info``.

    Returns:
        A dict that the published JSON schema accepts: nodes in node order, links by target and then source.
        ``influence`` of a node is ``cumulative``, ``activation`` and ``weight`` are the graph's own numbers. In a graph
        with adapters, features have an extra entry ``owner`` (``"transcoder"`` or ``"adapter"``), and ``metadata``
        has ``adapters_from``.

    Raises:
        ValueError: a slug that cannot name a file.
    """
    pruned = graph.prune() if isinstance(graph, Graph) else graph
    slug = _checked_slug(slug)
    ids = _viewer_ids(node_ids(pruned.graph, pruned.node_mask))
    return {
        "metadata": {**_metadata(pruned, slug, scan, transcoders), **(metadata or {})},
        "qParams": _viewer_state(q_params or {}, ids),
        "nodes": _nodes(pruned, ids, labels or {}),
        "links": _links(pruned, list(ids.values())),
    }


def _write(path: Path, content: Any) -> None:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="ascii")


def write_graph_json(graph: Graph | PrunedGraph, folder: str | Path, *, slug: str, **options: Any) -> Path:
    """Writes ``folder/<slug>.json`` and enters it in ``folder/graph-metadata.json``, each whole or not at all.

    Args:
        graph, slug, options: as for ``graph_json``.
        folder: made if it does not exist. An older graph of the same slug is replaced.

    Returns:
        Path of the graph's file.

    Raises:
        ValueError: as ``graph_json``; or the folder's ``graph-metadata.json`` is not one (it is left as it was).
        OSError: a file cannot be written.
    """
    content = graph_json(graph, slug=slug, **options)
    folder = Path(folder)
    index_path = folder / _INDEX
    index = read_json(index_path) if os.path.lexists(index_path) else {"graphs": []}
    if not isinstance(index, dict) or not isinstance(index.get("graphs"), list):
        raise ValueError(f'{index_path}: expected {{"graphs": [...]}}, got something else')
    entries = [
        entry for entry in index["graphs"] if not (isinstance(entry, dict) and entry.get("slug") == slug)
    ]
    path = folder / f"{slug}.json"
    if path == index_path:
        raise ValueError(f"slug: expected another name than that of the folder's index, got {slug!r}")
    _write(path, content)
    _write(index_path, {**index, "graphs": [*entries, content["metadata"]]})
    return path
