"""Graphs from the JSON of circuit-tracer and Neuronpedia: the way back of ``fasttc.graph.export``."""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fasttc._files import read_json
from fasttc.graph.export import node_ids
from fasttc.graph.graph import Graph
from fasttc.graph.influence import Scores
from fasttc.graph.prune import cumulative_share
from fasttc.graph.pruned import PrunedGraph
from fasttc.graph.supernodes import Supernodes

_KINDS = {"embedding": "token", "logit": "logit", "mlp reconstruction error": "error"}


class _Found(NamedTuple):
    """A node of the file."""

    node_id: str
    kind: str
    layer: int
    position: int
    number: int  # of the feature or token
    value: float  # activation or probability
    clerp: str

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Place in the order of a graph's nodes; logits as they come."""
        kind = ("feature", "error", "token", "logit").index(self.kind)
        return (kind, 0, 0, 0) if kind == 3 else (kind, self.layer, self.position, self.number)


def read_graph_json(path: str | Path) -> tuple[PrunedGraph, Supernodes]:
    """Reads a graph JSON: the kept part as a pruned graph, and the viewer's groups, pins and labels by ``node_ids``.

    The file does not say what was dropped: rows are taken as whole, scores and influence are those of what is there.
    circuit-tracer gives an error and a layer-0 feature the same id where their numbers meet. A link *to* such an id is
    the feature's, as errors have no inputs; *from* it, the two are told apart if both have a link to the same target
    (the feature's comes first), else the feature is taken and counted in ``metadata["ambiguous_links"]``.

    Raises:
        ValueError: no such file, not JSON, or not an attribution graph with layered nodes; one line with the path.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected a graph JSON, there is no file of that name")
    content = read_json(path)
    try:
        return graph_from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: expected a graph JSON of circuit-tracer or Neuronpedia: {reason}"
        ) from error


def graph_from_json(content: Mapping[str, Any]) -> tuple[PrunedGraph, Supernodes]:
    """As :func:`read_graph_json`, of an object."""
    about, settings = content["metadata"], content.get("qParams") or {}
    nodes = [_found(node) for node in content["nodes"]]
    logits = [node for node in nodes if node.kind == "logit"]
    if not logits:
        raise ValueError("nodes: expected at least one logit, got none")
    n_layers, tokens = logits[0].layer - 1, [str(token) for token in about["prompt_tokens"]]
    for node in nodes:
        _check(node, n_layers, len(tokens))
    place = {node: at for at, node in enumerate(sorted(nodes, key=lambda node: node.order))}
    if len(place) < len(nodes):
        raise ValueError("nodes: expected every node once, got duplicates")
    features = [node for node in place if node.kind == "feature"]
    ids = {node.position: node.number for node in nodes if node.kind == "token"}
    first_error = len(features)
    first_token = first_error + n_layers * len(tokens)
    number = {}
    for node, at in place.items():
        if node.kind == "error":
            number[node] = first_error + node.layer * len(tokens) + node.position
        elif node.kind == "token":
            number[node] = first_token + node.position
        else:
            number[node] = at if node.kind == "feature" else first_token + len(tokens) + logits.index(node)
    total = first_token + len(tokens) + len(logits)
    targets, sources, weights, ambiguous = _edges(content["links"], number)
    order = np.lexsort((sources, targets))
    graph = Graph(
        n_layers=n_layers,
        features=torch.tensor([[f.layer, f.position, f.number] for f in features]).reshape(-1, 3),
        activations=torch.tensor([f.value for f in features], dtype=torch.float32),
        input_ids=torch.tensor([ids.get(at, 0) for at in range(len(tokens))]),
        logit_ids=torch.tensor([node.number for node in logits]),
        logit_probs=torch.tensor([node.value for node in logits], dtype=torch.float32),
        row_ptr=torch.from_numpy(np.searchsorted(targets[order], np.arange(total + 1))),
        columns=sources[order],
        values=torch.from_numpy(weights[order].astype(np.float32)),
        tokens=tokens,
        logit_labels=[_label(node) for node in logits],
        prompt=str(about.get("prompt", "")),
        metadata={
            "model": about.get("scan", ""),
            "imported": about,
            "ambiguous_links": ambiguous,
            **_adapters(about, n_layers),
        },
    )
    mask = torch.zeros(total, dtype=torch.bool)
    mask[list(number.values())] = True
    mask[first_token:] = True
    ids = node_ids(graph)
    return _pruned(graph, mask, about), _state({node: ids[at] for node, at in number.items()}, settings)


def _found(node: Mapping[str, Any]) -> _Found:
    kind = _KINDS.get(node["feature_type"], "feature")
    parts = str(node["node_id"]).split("_")
    position = int(node["ctx_idx"])
    layer = -1 if kind == "token" else int(node["layer"])
    value = node.get("token_prob") if kind == "logit" else node.get("activation")
    number = 0
    if kind == "feature":
        number = int(parts[1]) if len(parts) >= 3 and parts[1].isdigit() else _unpaired(int(node["feature"]))
    elif kind in ("token", "logit") and len(parts) >= 3 and parts[1].isdigit():
        number = int(parts[1])
    return _Found(
        str(node["node_id"]), kind, layer, position, number, float(value or 0.0), str(node.get("clerp") or "")
    )


def _check(node: _Found, n_layers: int, n_tokens: int) -> None:
    """Raises: ValueError for a node outside the graph that the logits' layer and the prompt's tokens span."""
    if not 0 <= node.position < n_tokens:
        raise ValueError(
            f"nodes: expected positions (ctx_idx) from 0 to {n_tokens - 1}, got {node.position} of {node.node_id!r}"
        )
    if node.kind in ("feature", "error") and not 0 <= node.layer < n_layers:
        raise ValueError(
            f"nodes: expected layers from 0 to {n_layers - 1} below the logits', got {node.layer} of {node.node_id!r}"
        )


def _adapters(about: Mapping[str, Any], n_layers: int) -> dict[str, list[int]]:
    """Where the features of adapters begin in each layer, in files that this package wrote of graphs with adapters."""
    first = about.get("adapters_from")
    if first is None:
        return {}
    if not isinstance(first, list) or len(first) != n_layers or not all(type(one) is int for one in first):
        raise ValueError(f"adapters_from: expected {n_layers} integers, got {first!r:.80}")
    return {"adapters_from": first}


def _unpaired(pair: int) -> int:
    """Index of Cantor's pairing of layer and index."""
    diagonal = (isqrt(8 * pair + 1) - 1) // 2
    return pair - diagonal * (diagonal + 1) // 2


def _edges(links: list[Mapping[str, Any]], number: Mapping[_Found, int]) -> tuple[Any, Any, Any, int]:
    """Targets, sources, weights and how many sources could be two nodes."""
    by_id: dict[str, list[_Found]] = {}
    for node in number:  # in node order: a feature before an error
        by_id.setdefault(node.node_id, []).append(node)
    seen: dict[tuple[int, str], int] = {}
    targets, sources, weights = [], [], []
    for link in links:
        target = number[by_id[link["target"]][0]]
        owners = by_id[link["source"]]
        copies = seen.get((target, link["source"]), 0)
        seen[target, link["source"]] = copies + 1
        if copies >= len(owners):
            raise ValueError(f"links: expected each once, got {link['source']} -> {link['target']} again")
        targets.append(target)
        sources.append(number[owners[copies]])
        weights.append(float(link["weight"]))
    ambiguous = sum(len(by_id[name]) > 1 and count < len(by_id[name]) for (_, name), count in seen.items())
    return np.array(targets, np.int64), np.array(sources, np.int32), np.array(weights), ambiguous


def _label(node: _Found) -> str:
    """The token in ``Output "token" (p=0.5)``, else the text as it is."""
    text = node.clerp
    if text.startswith('Output "') and '" (p=' in text:
        return text[len('Output "') : text.rindex('" (p=')]
    return text


def _pruned(graph: Graph, mask: Any, about: Mapping[str, Any]) -> PrunedGraph:
    influence = graph.influence()
    settings = about.get("pruning_settings") or {}
    return PrunedGraph(
        graph=graph,
        node_threshold=float(about.get("node_threshold") or settings.get("node_threshold") or 1.0),
        edge_threshold=float(settings.get("edge_threshold") or 1.0),
        node_mask=mask,
        edge_mask=torch.ones(graph.n_edges, dtype=torch.bool),
        influence=influence,
        cumulative=torch.from_numpy(cumulative_share(influence.numpy())),
        full_scores=Scores(float("nan"), float("nan"), float("nan")),
    )


def _state(ids: Mapping[_Found, str], settings: Mapping[str, Any]) -> Supernodes:
    """What the file says of its nodes, by their ids here; of two nodes with one id in the file, of the feature."""
    own: dict[str, str] = {}
    for node, node_id in ids.items():  # in node order: a feature before an error
        own.setdefault(node.node_id, node_id)
    made = Supernodes.from_q_params(
        {
            "supernodes": [
                [name, *(own.get(str(one), one) for one in members)]
                for name, *members in settings.get("supernodes") or []
            ],
            "pinnedIds": [own.get(str(one), one) for one in settings.get("pinnedIds") or []],
        }
    )
    labels = {ids[node]: node.clerp for node in ids if node.clerp and node.kind == "feature"}
    return Supernodes(groups=made.groups, labels=labels, pinned=made.pinned)
