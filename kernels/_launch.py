"""How kernels are launched: frozen configs per architecture, opt-in tuning, and the ahead-of-time registry.

**Configs.** A kernel file keeps one :data:`ConfigTable` per kernel, built by :func:`config_table`; a launcher takes
``config: KernelConfig | None = None`` and falls back to :func:`configure`. Nothing is timed unless
``FASTTC_AUTOTUNE=1``: the same call runs the same code on every run, so results are bitwise the same.

**Ahead-of-time registry.** Each module of this folder with kernels exposes ``aot_cases(d: int) -> list[AotCase]``:
one case per kernel and input dtype worth checking at model width ``d``. ``python -m benchmarks aot`` imports every
module here whose name has no leading underscore, compiles the cases for each architecture and checks what they
promise. Rules for a case:

* ``signature`` names every argument in order: ``"*fp32"``, ``"*bf16"``, ``"*i32"``, ``"i32"``, ``"i64"``,
  ``"constexpr"``, or ``"tensordesc<bf16[128,64]>"`` (a callable of the config may be given where it depends on it).
* ``constants`` gives every constexpr that the config does not set, and integer arguments that are 1 at run time
  (unit strides), as the JIT would.
* ``divisible`` names the pointers and integers that are multiples of 16 at run time (the JIT finds out by itself;
  a compiler ahead of time must be told, or nothing vectorises). For an odd ``d`` leave strides of ``d`` out.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttc.kernels._lang import interpreting as interpreting


@dataclass(frozen=True)
class Architecture:
    """A compile target and the shared memory (LDS) one program may use on it."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int


# Shared memory per program: CUDA programming guide, "Technical specifications per compute capability"; CDNA 3 ISA.
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_80", "cuda", 80, 32, 163 * 1024),
        Architecture("sm_90", "cuda", 90, 32, 227 * 1024),
        Architecture("sm_100", "cuda", 100, 32, 227 * 1024),
        Architecture("sm_120", "cuda", 120, 32, 99 * 1024),
        Architecture("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}
INTERPRETED_AS = "sm_90"  # whose config the interpreter runs with, unless the caller names another


@dataclass(frozen=True)
class KernelConfig:
    """Launch parameters of one kernel: warps, pipeline stages, and its block sizes by constexpr name."""

    num_warps: int
    num_stages: int
    blocks: tuple[tuple[str, Any], ...] = ()

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch. FMA fusion is named because its default differs between versions."""
        return {
            **dict(self.blocks),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def __getitem__(self, name: str) -> Any:
        return dict(self.blocks)[name]

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={value}" for name, value in self.blocks)
        return f"{blocks} warps={self.num_warps} stages={self.num_stages}"


def config(num_warps: int = 4, num_stages: int = 2, **blocks: Any) -> KernelConfig:
    """``config(8, 3, BLOCK_M=128, BLOCK_N=256)``."""
    return KernelConfig(num_warps, num_stages, tuple(blocks.items()))


ConfigTable = Mapping[str, KernelConfig]


def config_table(default: KernelConfig, **named: KernelConfig) -> ConfigTable:
    """A config for every known architecture: the named ones, and ``default`` for the rest."""
    unknown = set(named) - set(ARCHITECTURES)
    if unknown:
        raise ValueError(
            f"config_table: expected architectures among {sorted(ARCHITECTURES)}, got {sorted(unknown)}"
        )
    return {name: named.get(name, default) for name in ARCHITECTURES}


class MatrixTables(NamedTuple):
    """The configs of a kernel with a matrix product.

    Attributes:
        half: 16-bit operands whose rows start at multiples of 16 bytes.
        half_any: 16-bit operands with any row length: read element by element, which takes registers.
        single: float32 operands.
    """

    half: ConfigTable
    half_any: ConfigTable
    single: ConfigTable

    def of(self, single: bool, even: bool) -> ConfigTable:
        """The table for float32 or half precision, and for rows of 16-byte multiples or not."""
        return self.single if single else self.half if even else self.half_any


def architecture(device: torch.device) -> str:
    """Name of a device's architecture: ``sm_90``, ``gfx942``, …; the interpreter's stand-in for a CPU."""
    if device.type != "cuda":
        return INTERPRETED_AS
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def nearest_architecture(name: str) -> str:
    """The known architecture whose configs ``name`` uses: itself, else the nearest lower one of its family, else
    the family's lowest."""
    if name in ARCHITECTURES:
        return name
    family = "gfx" if name.startswith("gfx") else "sm_"
    base = 16 if family == "gfx" else 10
    known = sorted((int(a.removeprefix(family), base), a) for a in ARCHITECTURES if a.startswith(family))
    number = int(name.removeprefix(family), base)
    return max((pair for pair in known if pair[0] <= number), default=known[0])[1]


def autotuning() -> bool:
    """Whether configs are timed: ``FASTTC_AUTOTUNE=1`` and real hardware."""
    return os.environ.get("FASTTC_AUTOTUNE", "0") == "1" and not interpreting()


_tuned: dict[tuple, KernelConfig] = {}


def configure(
    table: ConfigTable,
    device: torch.device,
    *,
    key: tuple = (),
    candidates: Sequence[KernelConfig] = (),
    run: Callable[[KernelConfig], Any] | None = None,
) -> KernelConfig:
    """The config a kernel is launched with: the architecture's entry of ``table``.

    With ``FASTTC_AUTOTUNE=1`` and candidates, ``run(config)`` is timed for the entry and each candidate, once per
    ``key`` (kernel name and sizes) and process, and the fastest is kept; one that does not launch is passed over.
    """
    shipped = table[nearest_architecture(architecture(device))]
    if not candidates or run is None or not autotuning():
        return shipped
    full_key = (architecture(device), *key)
    if full_key not in _tuned:
        _tuned[full_key] = _fastest([shipped, *candidates], run)
    return _tuned[full_key]


def _fastest(candidates: Iterable[KernelConfig], run: Callable[[KernelConfig], Any]) -> KernelConfig:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times = {}
    for candidate in candidates:
        try:
            times[candidate] = do_bench(lambda c=candidate: run(c), return_mode="median")
        except OutOfResources:
            continue
    if not times:
        raise RuntimeError(
            "no candidate config launches on this device: its shared memory is too small for all"
        )
    return min(times, key=lambda c: times[c])


def on_device(tensor: Tensor):
    """Context in which launches go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)`` for positive b."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two ≥ max(n, 1)."""
    return 1 << max(n - 1, 0).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: exactly, unless the user allowed TF32 through PyTorch."""
    allowed = torch.version.hip is None and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device; a few for the interpreter, so that programs share work there."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class AotCase:
    """One kernel at one width, as the ahead-of-time suite compiles it. See the module's docstring for the rules.

    Attributes:
        name: unique within the module, such as ``"decode bf16"``.
        kernel: the ``@triton.jit`` function.
        signature: argument name -> type string, or a function of the config that gives it; every argument in order.
        constants: constexpr arguments that no config sets, and integer arguments equal to 1.
        configs: the kernel's table.
        divisible: arguments that are multiples of 16.
        vector_loads: promises 128-bit global loads (on NVIDIA: LDG.128, cp.async of 16 bytes, or TMA).
        matrix_unit: promises matrix instructions (wgmma on sm_90, tcgen05 on sm_100, mma elsewhere, MFMA on AMD).
        targets: architectures to compile for; all by default.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | Callable[[KernelConfig], str]]
    constants: Mapping[str, Any]
    configs: ConfigTable
    divisible: tuple[str, ...] = ()
    vector_loads: bool = False
    matrix_unit: bool = False
    targets: tuple[str, ...] = field(default=tuple(ARCHITECTURES))
