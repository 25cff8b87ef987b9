"""Attribution graphs: what they hold, what carries influence in them, what can be left out, and files of them.

Knows nothing of models or of how a graph was made; needs no GPU and no dense matrix.
"""

from fasttc.graph.diff import Change, GraphDiff, diff
from fasttc.graph.export import graph_json, node_ids, write_graph_json
from fasttc.graph.graph import ERROR, FEATURE, KINDS, LOGIT, TOKEN, Graph
from fasttc.graph.influence import ScoreBounds, Scores
from fasttc.graph.load import load_graph
from fasttc.graph.mechanism import Mechanism, MechanismReport, concept_nodes, mechanism, mechanism_report
from fasttc.graph.merge import MergeBounds, merge, merge_by
from fasttc.graph.merged import MergedGraph
from fasttc.graph.names import node_names
from fasttc.graph.paths import (
    LengthProfile,
    Path,
    influence_avoiding,
    length_profile,
    strongest_paths,
    whole_graph,
)
from fasttc.graph.pruned import PrunedGraph
from fasttc.graph.quotient import MergeLoss
from fasttc.graph.read_json import read_graph_json
from fasttc.graph.significance import FeatureChange, feature_changes
from fasttc.graph.supernodes import Supernodes

__all__ = [
    "ERROR",
    "FEATURE",
    "KINDS",
    "LOGIT",
    "TOKEN",
    "Change",
    "FeatureChange",
    "Graph",
    "GraphDiff",
    "LengthProfile",
    "Mechanism",
    "MechanismReport",
    "MergeBounds",
    "MergeLoss",
    "MergedGraph",
    "Path",
    "PrunedGraph",
    "ScoreBounds",
    "Scores",
    "Supernodes",
    "concept_nodes",
    "diff",
    "feature_changes",
    "graph_json",
    "influence_avoiding",
    "length_profile",
    "load_graph",
    "mechanism",
    "mechanism_report",
    "merge",
    "merge_by",
    "node_ids",
    "node_names",
    "read_graph_json",
    "strongest_paths",
    "whole_graph",
    "write_graph_json",
]
