"""Compiles one kernel for one architecture without a GPU and reads its footprint out of the machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fasttc.kernels._launch import ARCHITECTURES, AotCase

NVIDIA_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
WIDE_LOADS = {"cuda": r"\b(LDG\.E\.\S*128|LDGSTS\.\S*128|UTMALDG)", "hip": r"\b(global|buffer)_load_dwordx4"}
# What the promise of matrix instructions means on each architecture, in PTX or AMD assembly.
MATRIX = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async",
    "sm_100": r"\btcgen05\.mma",
    "sm_120": r"\bmma\.sync",
    "gfx942": r"\bv_mfma_",
}


@dataclass
class Footprint:
    """What one compiled kernel uses.

    Attributes:
        registers: per thread (AMD: vector registers, accumulators included).
        spills: NVIDIA: loads and stores of local memory in the machine code; AMD: spilled vector registers.
        scalar_spills: AMD: scalar registers kept in lanes of vector registers, which costs no memory traffic.
        shared: bytes of shared memory (LDS) of a program.
        wide_loads: whether 128-bit loads from global memory occur.
        matrix_unit: whether the architecture's matrix instructions occur.
        failures: promises not kept.
    """

    registers: int
    spills: int
    scalar_spills: int
    shared: int
    instructions: int
    wide_loads: bool
    matrix_unit: bool
    failures: list[str] = field(default_factory=list)


def identity(case: AotCase, target: str) -> tuple:
    """Equal for two cases that compile to the same code: widths often differ in nothing a compiler sees."""
    chosen = case.configs[target]
    signature = tuple((n, t if isinstance(t, str) else t(chosen)) for n, t in case.signature.items())
    constants = tuple(sorted((n, repr(v)) for n, v in case.constants.items()))
    return case.kernel, signature, constants, tuple(sorted(case.divisible)), chosen, target


def source_of(case: AotCase, target: str) -> ASTSource:
    """The kernel with its types, constants and divisibility at one architecture's config."""
    chosen = case.configs[target]
    signature = {n: t if isinstance(t, str) else t(chosen) for n, t in case.signature.items()}
    names = list(case.kernel.arg_names)
    if list(signature) != names:
        raise ValueError(f"{case.name}: expected the arguments {names}, got {list(signature)}")
    constants = {**dict(chosen.blocks), **case.constants}
    missing = [n for n, t in signature.items() if t == "constexpr" and n not in constants]
    if missing:
        raise ValueError(f"{case.name}: expected values for the constants {missing}, got none")
    hints = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n in case.divisible
        if n not in constants and not signature[n].startswith("tensordesc")
    }
    used = {n: v for n, v in constants.items() if n in names}
    return ASTSource(case.kernel, signature, constexprs=used, attrs=hints)


def inspect(case: AotCase, target: str) -> Footprint:
    """Compiles a case and checks what it promises.

    Raises:
        Whatever the compiler raises where the kernel does not compile at all.
    """
    chip = ARCHITECTURES[target]
    chosen = case.configs[target]
    options = {k: v for k, v in chosen.options().items() if k not in dict(chosen.blocks)}
    gpu = GPUTarget(chip.backend, chip.arch, chip.warp_size)
    compiled = triton.compile(source_of(case, target), target=gpu, options=options)
    found = _nvidia(compiled, target) if chip.backend == "cuda" else _amd(compiled, target)
    if found.spills:
        found.failures.append(f"spills {found.spills}")
    if found.shared > chip.shared_bytes:
        found.failures.append(f"shared memory {found.shared} > {chip.shared_bytes}")
    if case.vector_loads and not found.wide_loads:
        found.failures.append("no 128-bit loads")
    if case.matrix_unit and not found.matrix_unit:
        found.failures.append("no matrix instructions")
    return found


def _nvidia(compiled, target: str) -> Footprint:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output("cuobjdump", "-res-usage", str(cubin))
        sass = _output("nvdisasm", "-c", str(cubin))
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump: expected a line with REG:<n>, got {usage[:200]!r}")
    return Footprint(
        registers=int(registers[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        scalar_spills=0,
        shared=compiled.metadata.shared,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
        wide_loads=re.search(WIDE_LOADS["cuda"], sass) is not None,
        matrix_unit=re.search(MATRIX[target], compiled.asm["ptx"]) is not None,
    )


def _amd(compiled, target: str) -> Footprint:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return Footprint(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        scalar_spills=number("sgpr_spill_count"),
        shared=max(number("group_segment_fixed_size"), compiled.metadata.shared),
        instructions=len(re.findall(r"^\t[vsgbd]\w*_", text, re.MULTILINE)),
        wide_loads=re.search(WIDE_LOADS["hip"], text) is not None,
        matrix_unit=re.search(MATRIX[target], text) is not None,
    )


def _output(tool: str, *arguments: str) -> str:
    run = subprocess.run([str(NVIDIA_BIN / tool), *arguments], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{tool} {' '.join(arguments)}: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout
