"""What a byte and a product cost on each class of device: the data behind the dispatcher's choices.

Nothing here was timed by this project's kernels unless ``measured`` says so. Rates of the H200 (copy bandwidth and
bfloat16 GEMM) were measured on one card; the other rows are the data sheet's peak times the fraction of it that such
kernels usually reach, and every ``predicted`` field is arithmetic to be tested. ``python -m benchmarks`` measures the
roofs of a device.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Rates of one class of device.

    Attributes:
        name: as shown by ``explain``.
        architecture: of the kernels' config tables, such as ``sm_90``.
        bandwidth: bytes per second of a large copy, read plus written.
        gather: bytes per second at which rows of a table are gathered (part of it from the L2 cache).
        half: FLOP/s of a float16 or bfloat16 GEMM.
        single: FLOP/s of a float32 GEMM without TF32.
        tile_efficiency: speed of our GEMM, with its epilogue, relative to the vendor's.
        select_row: seconds of selection per row, at k = 64.
        launch: seconds a kernel costs however little it does.
        measured: the fields that were measured; the others are predictions.
    """

    name: str
    architecture: str
    bandwidth: float
    gather: float
    half: float
    single: float
    tile_efficiency: float = 0.90
    select_row: float = 2.0e-8
    launch: float = 4e-6
    measured: tuple[str, ...] = ()


COSTS = (
    Costs(
        "NVIDIA A100", "sm_80", bandwidth=1.8e12, gather=1.8e12, half=265e12, single=17e12, select_row=2.7e-8
    ),
    Costs("NVIDIA H100", "sm_90", bandwidth=3.0e12, gather=3.0e12, half=700e12, single=50e12),
    Costs(
        "NVIDIA H200",
        "sm_90",
        bandwidth=4.3e12,
        gather=4.3e12,
        half=790e12,
        single=50e12,
        measured=("bandwidth", "half"),
    ),
    Costs("NVIDIA B200", "sm_100", bandwidth=7.0e12, gather=7.0e12, half=1600e12, single=60e12),
    Costs("NVIDIA RTX 5090", "sm_120", bandwidth=1.6e12, gather=1.8e12, half=190e12, single=80e12),
    Costs("AMD Instinct MI300X", "gfx942", bandwidth=4.2e12, gather=4.2e12, half=600e12, single=80e12),
)


def costs_of(device_name: str, architecture: str) -> Costs:
    """The row whose name the device's name contains, else the first of the (known) architecture."""
    words = device_name.upper().split()
    for costs in COSTS:
        if costs.name.upper().split()[-1] in words:
            return costs
    return next(costs for costs in COSTS if costs.architecture == architecture)
