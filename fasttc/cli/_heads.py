"""Which attention heads carry a graph's strongest edges, as ``fasttc attribute`` shows it."""

from typing import Any

from fasttc.cli._common import table

_HEADS = 4  # of each edge that are named


def strongest_by_head(model: Any, tcs: Any, graph: Any, count: int, **owners: Any) -> list[dict[str, Any]]:
    """The ``count`` edges of ``graph`` that carry most influence, with their parts: direct, and the largest by head."""
    import numpy as np

    from fasttc.attribution import split_by_head
    from fasttc.graph import node_names
    from fasttc.graph.influence import edge_flow

    chosen = np.argsort(-edge_flow(graph), kind="stable")[:count]
    targets = np.searchsorted(graph.row_ptr.numpy(), chosen, side="right") - 1
    sources = graph.columns.numpy()[chosen]
    split = split_by_head(
        model, tcs, graph, list(zip(targets.tolist(), sources.tolist(), strict=True)), **owners
    )
    names = node_names(graph)
    return [
        {
            "source": names[source],
            "target": names[target],
            "edge": float(graph.values[edge]),
            "direct": float(split.direct[row]),
            "heads": [
                {"layer": layer, "head": head, "part": part}
                for layer, head, part in split.strongest(row, _HEADS)
                if part != 0
            ],
        }
        for row, (edge, target, source) in enumerate(
            zip(chosen.tolist(), targets.tolist(), sources.tolist(), strict=True)
        )
    ]


def head_table(edges: list[dict[str, Any]]) -> str:
    """The same for people: heads as ``layer.head``, each with its signed part of the edge."""
    rows = [
        {
            "edge": edge["edge"],
            "direct": edge["direct"],
            "by head (layer.head)": "  ".join(
                f"{h['layer']}.{h['head']} {h['part']:+.3g}" for h in edge["heads"]
            )
            or "-",
            "from -> to": f"{edge['source']} -> {edge['target']}",
        }
        for edge in edges
    ]
    return table(rows)
