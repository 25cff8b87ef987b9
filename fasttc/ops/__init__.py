"""The mathematics: sparse encode, decode and attribution edges with their gradients, behind one ``impl=`` switch."""

from fasttc.ops._dispatch import Choice as Choice
from fasttc.ops._dispatch import explain as explain
from fasttc.ops.acts import SparseActs as SparseActs
from fasttc.ops.decode import decode as decode
from fasttc.ops.decode import residual as residual
from fasttc.ops.edges import edges as edges
from fasttc.ops.encode import encode as encode
from fasttc.ops.row_adam import RowAdam as RowAdam
from fasttc.ops.segment import segment as segment

__all__ = ["Choice", "RowAdam", "SparseActs", "decode", "edges", "encode", "explain", "residual", "segment"]
