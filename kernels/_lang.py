"""Words every kernel shares: 64-bit offsets, exact rounding, keys that sort like floats, and a dot product.

Conventions of the kernel files:

* Addresses are computed in int64 (:func:`row_offset`): N·F and F·D pass 2^31 early.
* Every load that is not a dot operand is widened to float32 at once; every sum is float32.
* ``-0.0`` becomes ``+0.0`` before it is compared or stored, so that equal values have equal bits.
* Half-precision stores go through :func:`rounded`, because the interpreter truncates float32 to bfloat16.
"""

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before Triton was first imported)."""
    return not isinstance(tl.zeros, JITFunction)


INTERPRETING = tl.constexpr(interpreting())

LOWEST_KEY = tl.constexpr(-(2**31))  # below the key of every float, -inf included
GROUP = tl.constexpr(16)  # columns of a group in the hierarchical selection


@triton.jit
def row_offset(row, stride):
    """``row · stride`` in int64, for a scalar or a block of rows."""
    return tl.cast(row, tl.int64) * tl.cast(stride, tl.int64)


@triton.jit
def canonical(z):
    """The same float32 values with ``-0.0`` as ``+0.0``."""
    return tl.where(z == 0.0, 0.0, z)


@triton.jit
def order_key(z):
    """int32 keys that compare like the float32 values z: ``a < b`` iff ``key(a) < key(b)``. NaN has the highest key.

    A float's bits, read as an integer, ascend for positive values and descend for negative ones, so the 31 lower
    bits of negative values are flipped. NaN comes first, as in ``torch.sort``: a broken row must be seen.
    """
    bits = canonical(z).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(z != z, 0x7FFFFFFF, key)


@triton.jit
def key_value(key):
    """The float32 value of an order key: the inverse of :func:`order_key`, up to the bits of NaN."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 values in ``dtype``, rounded to nearest even, also by the interpreter (which truncates to bfloat16)."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        nearest = tl.where(value != value, bits, nearest)
        return nearest.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return value.to(dtype)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a b`` in float32. The interpreter cannot multiply bfloat16: there the operands are widened."""
    if INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def swizzled(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row tile, column tile) of a linear tile number, walking GROUP_M row tiles at a time so that both operands
    of neighbouring programs stay in the L2 cache."""
    per_group = GROUP_M * tiles_n
    first = (tile // per_group) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % per_group
    return first + within % height, within // height
