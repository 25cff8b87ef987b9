"""Short-hand for ahead-of-time cases whose arguments are pointers, integers and floats."""

from collections.abc import Mapping
from typing import Any

from fasttc.kernels._launch import AotCase, ConfigTable

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes of the input dtypes worth checking


def aligned(d: int, dtype: str) -> bool:
    """Whether rows of d elements start at multiples of 16 bytes."""
    return d * DTYPES[dtype] % 16 == 0


def case(
    name: str,
    kernel: Any,
    configs: ConfigTable,
    pointers: Mapping[str, str | None],
    *,
    odd: tuple[str, ...] = (),
    floats: tuple[str, ...] = (),
    constants: Mapping[str, Any] | None = None,
    **promises: Any,
) -> AotCase:
    """A case in which every pointer and every integer is a multiple of 16, as the JIT would find it.

    Args:
        name, kernel, configs: as in :class:`AotCase`.
        pointers: pointer argument -> element type, or None for an absent one.
        odd: integer arguments that are not multiples of 16.
        floats: floating-point arguments.
        constants: constexpr arguments that no config sets.
        promises: ``vector_loads`` and ``matrix_unit``.
    """
    signature, absent, divisible = {}, {}, []
    for argument in kernel.arg_names:
        if argument.isupper():
            signature[argument] = "constexpr"
        elif argument in floats:
            signature[argument] = "fp32"
        elif argument not in pointers:
            signature[argument] = "i32"
            divisible += [] if argument in odd else [argument]
        elif pointers[argument] is None:
            signature[argument], absent[argument] = "constexpr", None
        else:
            signature[argument] = f"*{pointers[argument]}"
            divisible.append(argument)
    return AotCase(
        name, kernel, signature, {**absent, **(constants or {})}, configs, tuple(divisible), **promises
    )
