"""Reads a graph file as what it is."""

from pathlib import Path

from fasttc.graph import _io
from fasttc.graph.graph import Graph
from fasttc.graph.merged import MergedGraph
from fasttc.graph.pruned import PrunedGraph


def load_graph(path: str | Path) -> Graph | PrunedGraph | MergedGraph:
    """Reads a graph file as what it is: ``MergedGraph`` or ``PrunedGraph`` for one that merging or pruning wrote, else
    ``Graph``.

    Raises:
        ValueError: as ``Graph.load``.
    """
    tensors, header = _io.read(path)
    if isinstance(header.get("merged"), dict):
        return MergedGraph._from_file(path, tensors, header)
    if isinstance(header.get("pruned"), dict):
        return PrunedGraph._from_file(path, tensors, header)
    return Graph._from_file(path, tensors, header)
