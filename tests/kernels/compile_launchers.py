"""Calls every launcher as on a GPU of the architecture named on the command line, up to the launch. Needs no GPU.

Triton gets a driver that names an architecture and has no device, every launch becomes a compilation, and one JSON
line per compiled code goes to the output: kernel, spills, shared memory. Run by test_jit.py.
"""

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fasttc.benchmarks.ops import aot_inspect
from fasttc.kernels import _launch
from fasttc.kernels._features import Terms, sort_entries
from fasttc.kernels.adam import AdamStep, RowState, launch_adam
from fasttc.kernels.batch import launch_encode_batch_topk
from fasttc.kernels.certificate import launch_encode_topk_certified
from fasttc.kernels.decode import launch_decode
from fasttc.kernels.edges import launch_edges
from fasttc.kernels.encode import launch_encode_topk
from fasttc.kernels.sddmm import launch_sddmm
from fasttc.kernels.segment import launch_segment
from fasttc.kernels.threshold import launch_encode_threshold

N, F, K = 9, 5000, 32
CASES = [(torch.bfloat16, 256), (torch.bfloat16, 37), (torch.float32, 256), (torch.float16, 1)]


class NoDevice:
    """A driver as far as a compilation asks it."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0


def compile_instead_of_launching(architecture: str) -> None:
    chip = _launch.ARCHITECTURES[architecture]
    driver.set_active(NoDevice(GPUTarget(chip.backend, chip.arch, chip.warp_size)))
    inspect = aot_inspect._nvidia if chip.backend == "cuda" else aot_inspect._amd
    run, seen = JITFunction.run, set()

    def compile_only(self, *args, grid=None, warmup=False, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            found = inspect(compiled, architecture)
            print(json.dumps({"kernel": self.fn.__name__, "spills": found.spills, "shared": found.shared}))
        return compiled

    JITFunction.run = compile_only
    _launch.architecture = lambda device: architecture
    torch.empty = torch.zeros  # what kernels would have written: counts and offsets of zero


def call_every_launcher(dtype: torch.dtype, d: int) -> None:
    x, W, b = torch.zeros(N, d, dtype=dtype), torch.zeros(F, d, dtype=dtype), torch.zeros(F, dtype=dtype)
    for gemm in ("tile", "vendor"):
        launch_encode_topk(x, W, b, K, gemm=gemm)
        launch_encode_threshold(x, W, b, torch.zeros(F), bandwidth=1.0, gemm=gemm)
        launch_encode_threshold(x, W, b, torch.zeros(()), gemm=gemm)
        launch_encode_batch_topk(x, W, b, K, gemm=gemm)
    launch_encode_topk_certified(x, W, b, K)
    values, indices = (
        torch.zeros(N, 1024),
        torch.zeros(N, 1024, dtype=torch.int32),
    )  # rows long enough to be cut
    row_ptr = torch.arange(N + 1) * 1024
    for entries in ((values, indices, None), (values.view(-1), indices.view(-1), row_ptr)):
        launch_decode(*entries, W, bias=b[:d])
        launch_decode(*entries, W, bias=b[:d], init=x, target=x)
        launch_sddmm(x, W, *entries[1:])
        order = sort_entries(*entries[1:], F)
        both = Terms(entries[0], x, entries[0], x, entries[0])
        for terms in (both, Terms(values=entries[0], left=x), Terms(grads=entries[0], right=x)):
            launch_segment(order, terms, dec_dtype=dtype, enc_dtype=dtype)
        launch_segment(order, both, add_to=(W, W))
        for unit, last_step in ((True, None), (False, torch.zeros(F, dtype=torch.int32))):
            dec, enc = (RowState(*torch.zeros(3, F, d), unit_norm=unit, shadow=W) for _ in range(2))
            launch_adam(order, both, AdamStep(1, 1e-3), dec=dec, enc=enc, last_step=last_step)
    place = torch.zeros(40, dtype=torch.int64)
    for targets in (None, torch.zeros(3, dtype=torch.int64)):
        launch_edges(x.expand(3, N, d), W, place, place, torch.zeros(40), targets)
        launch_edges(x.float().expand(3, N, d), W, place, place, torch.zeros(40), targets)


if __name__ == "__main__":
    compile_instead_of_launching(sys.argv[1])
    for case in CASES:
        call_every_launcher(*case)
    launch_encode_topk(torch.zeros(3, 16), torch.zeros(100_000, 16), torch.zeros(100_000), 2000)  # long rows
