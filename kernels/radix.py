"""The k-th largest of many values, exactly, on the device: radix selection over order keys.

Four passes settle the 32 bits of the key, 8 at a time from the top: each counts the next digit of the keys that share
the bits settled so far, and the digit in which the k-th lies is found by a sum over 256 counts. Counts are integers,
so neither the order of the atomics nor the number of programs shows in the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._aot import case
from fasttc.kernels._lang import order_key
from fasttc.kernels._launch import AotCase, cdiv, config, config_table, configure, on_device

_RADIX = config_table(config(4, 2, BLOCK=4096))
_PROGRAMS = 1024  # enough to fill any device; each walks over its share


@triton.jit
def _digit_histogram(
    values,  # [n] float32
    prefix,  # [1] int64: the bits already settled, as an unsigned key without its lower SHIFT + 8 bits
    counts,  # [256] int32, zero at first
    n,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts, over the values whose key starts with ``prefix``, of the next 8 bits of the key (integer atomics)."""
    settled = tl.load(prefix)
    total = tl.zeros([256], tl.int32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, stride):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        key = order_key(tl.load(values + at, mask=inside, other=0.0)).to(tl.int64) + 0x80000000
        matching = inside & ((key >> (SHIFT + 8)) == settled)
        total += tl.histogram(((key >> SHIFT) & 0xFF).to(tl.int32), 256, mask=matching)
    tl.atomic_add(counts + tl.arange(0, 256), total)


def kth_key(values: Tensor, k: int | Tensor) -> Tensor:
    """int32 order key [] of the k-th largest of all of ``values`` (float32, contiguous), 1 ≤ k ≤ their number.

    Nothing reaches the host.
    """
    flat = values.reshape(-1)
    device = flat.device
    chosen = configure(_RADIX, device)
    programs = min(cdiv(flat.numel(), chosen["BLOCK"]), _PROGRAMS)
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    wanted = k.long().reshape(1) if isinstance(k, Tensor) else torch.full((1,), k, device=device)
    for shift in (24, 16, 8, 0):
        counts = torch.zeros(256, dtype=torch.int32, device=device)
        with on_device(flat):
            _digit_histogram[(programs,)](flat, prefix, counts, flat.numel(), SHIFT=shift, **chosen.options())
        from_top = counts.long().flip(0).cumsum(0)
        steps = torch.searchsorted(from_top, wanted)  # how far below 255 the digit lies
        wanted = wanted - torch.where(steps > 0, from_top[(steps - 1).clamp(min=0)], 0)
        prefix = prefix * 256 + (255 - steps)
    return (prefix - 2**31).int().reshape(())


def aot_cases(d: int) -> list[AotCase]:
    """The counting pass; it does not depend on d."""
    pointers = {"values": "fp32", "prefix": "i64", "counts": "i32"}
    return [
        case("digit_histogram", _digit_histogram, _RADIX, pointers, constants={"SHIFT": 8}, vector_loads=True)
    ]
