"""Attribution graphs: what they hold, what carries influence in them, what can be left out, and files of them.

Knows nothing of models or of how a graph was made; needs no GPU and no dense matrix.
"""

from fasttc.graph.export import graph_json, node_ids, write_graph_json
from fasttc.graph.graph import ERROR, FEATURE, KINDS, LOGIT, TOKEN, Graph, load_graph
from fasttc.graph.influence import ScoreBounds, Scores
from fasttc.graph.pruned import PrunedGraph
from fasttc.graph.supernodes import Supernodes

__all__ = [
    "ERROR",
    "FEATURE",
    "KINDS",
    "LOGIT",
    "TOKEN",
    "Graph",
    "PrunedGraph",
    "ScoreBounds",
    "Scores",
    "Supernodes",
    "graph_json",
    "load_graph",
    "node_ids",
    "write_graph_json",
]
