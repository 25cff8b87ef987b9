"""The page: attribution graphs as one HTML file that needs nothing else, neither a network nor a server.

Everything from outside (tokens, labels, names) is data: it is embedded as JSON in an element that browsers do not run,
with ``<``, ``>`` and ``&`` escaped, and the scripts only ever set text. Should one of them not, the page's own policy
still forbids it: no script runs but those whose hash is listed, nothing is loaded, and with Trusted Types no string
can become markup.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from fasttc._files import atomic_file
from fasttc.graph import KINDS, Graph, PrunedGraph, Scores, node_ids
from fasttc.graph.diff import check_owners
from fasttc.graph.names import feature_numbers
from fasttc.report.evidence import FeatureFolder, find_evidence
from fasttc.report.state import State, origin

MAX_EDGES = 120_000  # about 2 MB; what a browser prunes anew in less time than a slider's next step
_PRE_PRUNING = (
    (0.98, 0.995),
    (0.95, 0.99),
    (0.9, 0.98),
    (0.8, 0.98),
    (0.7, 0.95),
    (0.5, 0.9),
    (0.2, 0.7),
    (0.0, 0.0),
)
_EVIDENCE_BYTES = 12_000_000  # of feature evidence in one file
_SCRIPTS = (  # in the order in which they need one another
    "_vendor/d3.min.js", "_assets/base.js", "_assets/graph.js", "_assets/paths.js", "_assets/state.js",
    "_assets/scene.js", "_assets/layout.js", "_assets/edges.js", "_assets/draw.js", "_assets/evidence.js",
    "_assets/panel.js", "_assets/controls.js", "_assets/keys.js", "_assets/export.js", "_assets/main.js",
)  # fmt: skip

FeatureLabels = Mapping[tuple[int, int], str]
Verdicts = Mapping[tuple[int, int], str]


def page_data(
    graph: Graph | PrunedGraph,
    *,
    base: Graph | PrunedGraph | None = None,
    labels: FeatureLabels | None = None,
    carried: Verdicts | None = None,
    name: str = "graph",
) -> dict[str, Any]:
    """What the page shows, as an object that JSON can hold.

    A whole graph of at most ``MAX_EDGES`` edges is embedded whole; a larger one is pruned first, as far as needed. A
    pruned graph is embedded as what was kept. In both cases dropped mass stays in the rows' remainder, so that shares
    and scores in the page are those of the whole graph, and pruning in the page equals ``Graph.prune`` of the part.

    Args:
        graph: the graph; of the fine-tuned model where ``base`` is given.
        base: the graph of the base model on the same prompt. Nodes are matched by kind, layer, position and feature.
        labels: text for features by (layer, index).
        carried: whether features by (layer, index) still mean what they meant in the base, in the words of
            ``fasttc.evaluation.carry_over``. It is shown; and with ``base``, only features that are "kept" are matched
            (and those of adapters, which are in no such table), as in ``fasttc.graph.diff``.
        name: what the page calls the graph when it saves something about it.

    Raises:
        ValueError: the two graphs are not of the same prompt, differ in their number of layers, or have owners as
            ``fasttc.graph.diff`` refuses them.
    """
    parts = [_embedded(graph)] if base is None else [_embedded(graph), _embedded(base)]
    first = parts[0][0]
    for other, _ in parts[1:]:
        if not torch.equal(first.input_ids, other.input_ids) or first.n_layers != other.n_layers:
            raise ValueError(
                f"base: expected a graph of the same prompt and model shape ({first.n_tokens} tokens, "
                f"{first.n_layers} layers), got {other.n_tokens} tokens, {other.n_layers} layers"
            )
        check_owners(other, first)
    nodes, numbers = _union([part for part, _ in parts], labels or {}, carried)
    titles = [("graph", "Graph")] if base is None else [("finetuned", "Fine-tuned"), ("base", "Base")]
    return {
        "name": name,
        "prompt": first.prompt,
        "tokens": first.tokens,
        "layers": first.n_layers,
        "nodes": nodes,
        "graphs": [
            {"view": view, "title": title, "model": str(part.metadata.get("model", "")), **about, **_columns(part),
             "nodes": own}
            for (view, title), (part, about), own in zip(titles, parts, numbers, strict=True)
        ],
        "evidence": {},
    }  # fmt: skip


def _embedded(graph: Graph | PrunedGraph) -> tuple[Graph, dict[str, Any]]:
    """The graph that is embedded, and what the page says about it."""
    if isinstance(graph, PrunedGraph):
        return graph.compact().graph, _about(graph.graph, graph.full_scores, [1.0, 1.0])
    if graph.n_edges <= MAX_EDGES:
        thresholds = [1.0, 1.0] if "pruned" in graph.metadata else [0.8, 0.98]
        return graph, _about(graph, graph.scores(), thresholds)
    tried = (graph.prune(*thresholds) for thresholds in _PRE_PRUNING)
    return _embedded(next(pruned for pruned in tried if pruned.n_edges <= MAX_EDGES))


def _about(whole: Graph, scores: Scores, thresholds: list[float]) -> dict[str, Any]:
    """Sizes and scores of the whole graph, and where the page's sliders start."""
    return {
        "thresholds": thresholds,
        "whole": {"nodes": whole.n_nodes, "edges": whole.n_edges, **whole.metadata.get("pruned", {})},
        "scores": {name: None if math.isnan(score) else score for name, score in scores._asdict().items()},
    }


_COLUMNS = ("id", "kind", "layer", "position", "feature", "label", "number", "owner", "carried", "evidence")


def _union(
    graphs: list[Graph], labels: FeatureLabels, carried: Verdicts | None
) -> tuple[dict[str, list[Any]], list[list[int]]]:
    """One table of the nodes of all graphs, by column, and each graph's nodes as rows of that table."""
    table: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    rows: dict[tuple[int, ...], int] = {}
    taken: set[str] = set()
    numbers = []
    for which, graph in enumerate(graphs):
        own = []
        described = zip(_keys(graph), node_ids(graph), _described(graph, labels, carried or {}), strict=True)
        for place, node_id, about in described:
            judged = carried is not None and KINDS[place[0]] == "feature" and about[2] != "adapter"
            apart = judged and about[3] != "kept"  # not the same in both graphs
            key = (*place, which) if apart else place
            if key not in rows:
                rows[key] = len(rows)
                while node_id in taken:  # another node of the first graph
                    node_id += "_base"
                taken.add(node_id)
                evidence = "" if apart and which else _evidence_key(KINDS[key[0]], key[1], *about)
                entry = (node_id, KINDS[key[0]], *key[1:4], *about, evidence)
                for name, value in zip(table, entry, strict=True):
                    table[name].append(value)
            own.append(rows[key])
        numbers.append(own)
    return table, numbers


def _keys(graph: Graph) -> list[tuple[int, ...]]:
    """What makes a node the same in two graphs: kind, layer, position, feature or token, and which one of equals."""
    none = torch.full((graph.n_errors,), -1)
    named = torch.cat([graph.features[:, 2], none, graph.input_ids, graph.logit_ids])
    columns = (graph.node_kind, graph.node_layer, graph.node_position, named)
    seen: dict[tuple[int, ...], int] = {}
    keys = []
    for entry in zip(*(column.tolist() for column in columns), strict=True):
        seen[entry] = seen.get(entry, -1) + 1
        keys.append((*entry, seen[entry]))
    return keys


def _described(graph: Graph, labels: FeatureLabels, carried: Verdicts) -> list[tuple[str, str, str, str]]:
    """Of each node: label, number in its own set, owner ("adapter" or nothing) and verdict; features have the last."""
    features = [
        (
            labels.get((layer, index), ""),
            number if adapted else f"#{number}",
            "adapter" if adapted else "",
            carried.get((layer, index), ""),
        )
        for (layer, _, index), number, adapted in zip(
            graph.features.tolist(), feature_numbers(graph), graph.from_adapter.tolist(), strict=True
        )
    ]
    others = [*[""] * graph.n_errors, *graph.tokens, *graph.logit_labels]
    return [*features, *((label, "", "", "") for label in others)]


def _evidence_key(kind: str, layer: int, label: str, number: str, owner: str, carried: str) -> str:
    """What the evidence of a feature goes by: its owner, layer and index in its own set; nothing for other nodes."""
    return f"{owner or 'transcoder'}/{layer}/{number[1:]}" if kind == "feature" else ""


def _columns(graph: Graph) -> dict[str, Any]:
    """The numbers of a graph; float32 ones (``single``) with the fewest digits that give the same float32."""
    numbers = {
        "values": graph.values, "activations": graph.activations, "probabilities": graph.logit_probs,
        "remainder": graph.remainder,
    }  # fmt: skip
    return {
        "single": [name for name, column in numbers.items() if column.dtype != torch.float64],
        "row_ptr": graph.row_ptr.tolist(),
        "columns": graph.columns.tolist(),
        **{
            name: column.tolist()
            if column.dtype == torch.float64
            else [float(str(number)) for number in column.float().numpy()]
            for name, column in numbers.items()
        },
    }


def with_evidence(data: dict[str, Any], folders: Sequence[FeatureFolder]) -> tuple[dict[str, Any], int]:
    """``data`` with the feature evidence in it, and how many features of the folders found no room.

    Features come in node order; after ``12 MB`` the rest is left out (a served page reads them one by one instead).
    A feature that the base alone has, since it was declared another one, has no evidence: the folders are those of
    the fine-tuned model.
    """
    evidence, size, left_out = {}, 0, 0
    for key in dict.fromkeys(filter(None, data["nodes"]["evidence"])):
        owner, layer, index = key.split("/")
        found = find_evidence(folders, owner, int(layer), int(index))
        if found is None:
            continue
        size += len(json.dumps(found))
        if size > _EVIDENCE_BYTES:
            left_out += 1
        else:
            evidence[key] = found
    return {**data, "evidence": evidence}, left_out


@cache
def _asset(name: str) -> str:
    return files("fasttc.report").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _json(content: Any) -> str:
    """JSON that no HTML parser can take for markup."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def policy(*, served: bool) -> str:
    """The page's Content-Security-Policy: its own scripts and style by hash, and nothing else from anywhere."""
    scripts = " ".join(_hash(_asset(name)) for name in _SCRIPTS)
    connect = "'self'" if served else "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src {_hash(_asset('_assets/page.css'))}; "
        f"img-src blob: data:; connect-src {connect}; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def page_html(data: Mapping[str, Any], state: State | None = None, *, served: bool = False) -> str:
    """The whole page.

    Args:
        data: from ``page_data``.
        state: what was edited, as the page saves it (a supernode file); none by default.
        served: whether a ``PageServer`` stands behind it, where it saves what is edited and asks for feature evidence.
            Otherwise it keeps what is edited in the browser, by the ``origin`` of ``state``.
    """
    parts = {
        "policy": policy(served=served),
        "style": _asset("_assets/page.css"),
        "data": _json({**data, "served": served, "origin": origin(state)}),
        "state": _json(state),
        "scripts": "\n".join(f"<script>{_asset(name)}</script>" for name in _SCRIPTS),
    }
    whole, marks = [], _asset("_assets/page.html").split("%%")  # text, name, text, name, ..., text
    for number, mark in enumerate(marks):
        whole.append(parts[mark] if number % 2 else mark)
    return "".join(whole)


def write_page(path: str | Path, data: Mapping[str, Any], state: State | None = None) -> None:
    """Writes the page as one file, whole or not at all; it works from a disk, without any network.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(page_html(data, state), encoding="utf-8")
