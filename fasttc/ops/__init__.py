"""The mathematics: sparse encode, decode and attribution edges with their gradients, behind one ``impl=`` switch."""

from fasttc.ops._dispatch import Choice as Choice
from fasttc.ops._dispatch import explain as explain
from fasttc.ops.acts import SparseActs as SparseActs
from fasttc.ops.decode import decode as decode
from fasttc.ops.decode import residual as residual
from fasttc.ops.edges import edges as edges
from fasttc.ops.encode import encode as encode

__all__ = ["Choice", "SparseActs", "decode", "edges", "encode", "explain", "residual"]
