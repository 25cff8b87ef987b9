"""Everything worth knowing on a new GPU, in under 8 minutes, from a bare checkout.

    python -m benchmarks gpu --out DIR
    TRITON_INTERPRET=1 python -m benchmarks gpu --out DIR --rehearse        on a CPU, with tiny shapes

Needs torch, triton, numpy and transformers. Each part runs in a process of its own, so that a crash or a hang costs
that part alone, and leaves DIR/PART.json and DIR/PART.log, rewritten after every case; DIR/summary.json says how each
went, which targets are met, and the device's rates. The most telling parts come first. Exits with 1 if one failed.
"""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fasttc.benchmarks import record

from . import gpu_targets

BUDGET = 460.0  # seconds for all parts
REHEARSAL_BUDGET = 3600.0  # the interpreter shares its CPU with who knows what


@dataclass(frozen=True)
class Part:
    """One process: an op on some shapes, timed for ``seconds`` a case and killed after ``limit``."""

    name: str
    op: str
    shapes: tuple[str, ...]
    seconds: float
    limit: float
    only: tuple[str, ...] = ()


def _shapes(tokens: Sequence[int], features: Sequence[int], k: int = 64, d: int = 2304) -> tuple[str, ...]:
    return tuple(f"{n},{d},{f},{k},bfloat16" for f in features for n in tokens)


WIDE = (65536, 131072)
GATHERS = (
    "fasttc",
    "dense",
    "embedding_bag",
    "sparsify",
)  # without the compiled one: compiling takes its time
PARTS = (
    Part("encode", "encode", _shapes((4096, 16384), WIDE), 2.0, 85),
    Part("step", "step", _shapes((4096, 16384), (65536,)) + _shapes((4096,), (16384,), k=128), 3.0, 95),
    Part("decode", "decode", _shapes((4096, 16384), (65536,)), 1.0, 40, GATHERS),
    Part("decode_backward", "decode_backward", _shapes((4096, 16384), (65536,)), 1.5, 45, GATHERS),
    Part("encode_backward", "encode_backward", _shapes((4096, 16384), (65536,)), 1.5, 45, GATHERS),
    Part("encode_threshold", "encode_threshold", _shapes((4096,), (65536,)), 1.0, 30),
    Part("encode_batch", "encode_batch", _shapes((4096,), (65536,)), 1.0, 30),
    Part("edges", "edges", ("64,2304,65536,64,bfloat16",), 1.0, 30),
    Part(
        "odd",
        "encode",
        ("4096,2305,65537,64,bfloat16", "4096,2304,65536,64,float32"),
        1.0,
        50,
        ("fasttc", "dense", "gemm"),
    ),
    Part("small", "step", ("64,2304,65536,64,bfloat16",), 1.0, 30, ("fasttc", "fasttc_rows", "dense")),
)
TINY = ("6,16,32,4,float32",)  # of a rehearsal: the interpreter needs a millisecond for every loop iteration


def command(part: Part, out: Path, device: str, rehearse: bool, seed: int) -> list[str]:
    """What a part runs."""
    words = [*record.COMMAND, "ops", "--op", part.op, "--device", device]
    words += ["--seconds", str(0.01 if rehearse else part.seconds), "--seed", str(seed)]
    words += ["--out", str(out / f"{part.name}.json")]
    for shape in TINY if rehearse else part.shapes:
        words += ["--shape", shape]
    for name in part.only:
        words += ["--only", name]
    return [*words, "--tiny-roofs"] if rehearse else words


def run_part(part: Part, out: Path, device: str, rehearse: bool, seed: int, limit: float) -> dict:
    """Runs a part and says how it went: status "ok", "failed" or "out of time", seconds, rows written."""
    start = time.perf_counter()
    log = out / f"{part.name}.log"
    with log.open("w", encoding="utf-8") as stream:
        try:
            words = command(part, out, device, rehearse, seed)
            done = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, timeout=limit, check=False)
            status = "ok" if done.returncode == 0 else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            status = "out of time"
    path = out / f"{part.name}.json"
    rows = record.read(path)["rows"] if path.exists() else []
    return {"part": part.name, "status": status, "seconds": time.perf_counter() - start, "rows": len(rows)}


def main(arguments: list[str]) -> int:
    parser = record.parser("gpu", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--only", action="append", choices=[p.name for p in PARTS], help="part, repeatable")
    parser.add_argument("--budget", type=float, help=f"seconds for all parts, {BUDGET:.0f} on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter"
    )
    options = parser.parse_args(arguments)
    if options.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--rehearse: expected TRITON_INTERPRET=1, so that kernels run in the interpreter")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("expected a GPU, found none; --rehearse runs every part on a CPU with tiny shapes")
    device = "cpu" if options.rehearse else "cuda"
    options.out.mkdir(parents=True, exist_ok=True)
    head = {
        "kind": "gpu",
        "rehearsal": options.rehearse,
        "environment": record.environment(device, options.seed),
    }
    print(json.dumps(head["environment"]), flush=True)
    budget = options.budget or (REHEARSAL_BUDGET if options.rehearse else BUDGET)
    start, told = time.perf_counter(), []
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        left = budget - (time.perf_counter() - start)
        if left < 5:
            told.append({"part": part.name, "status": "out of time", "seconds": 0.0, "rows": 0})
        else:
            limit = left if options.rehearse else min(part.limit, left)
            told.append(run_part(part, options.out, device, options.rehearse, options.seed, limit))
            print((options.out / f"{part.name}.log").read_text(encoding="utf-8"), flush=True)
        record.write(options.out / "summary.json", head, told)
    for row in told:
        print(f"{row['part']:16s} {row['status']:12s} {row['seconds']:6.1f} s {row['rows']:4d} rows")
    said, rates = gpu_targets.judge(options.out), gpu_targets.rates(options.out)
    record.write(options.out / "summary.json", {**head, "targets": said, "rates": rates}, told)
    if not options.rehearse:
        print(*said, *(f"rate: {name} = {rate:.4g}" for name, rate in rates.items()), sep="\n")
    return 0 if all(row["status"] == "ok" for row in told) else 1
