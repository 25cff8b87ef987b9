"""The GPU part: a model of the shape of Gemma-2-2b, random weights in bfloat16, sums in float32.

    python -m benchmarks attribution gpu                8,192 feature targets at 64 tokens, memory at 512 tokens
    python -m benchmarks attribution gpu --rehearse     every step on the CPU, with a toy model

Prints where the time goes beside what the counted operations take at the measured rate of the device, and the time of
circuit-tracer's algorithm for the same rows in the same process. Exits with 1 if a target is missed.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fasttc
from fasttc.attribution.collect import collect_rows
from fasttc.attribution.linearize import linearize
from fasttc.attribution.plan import make_budget
from fasttc.attribution.rows import EdgeWriter, Kept
from fasttc.attribution.sources import find_sources
from fasttc.attribution.targets import Resolver
from fasttc.attribution.trace import Sweep
from fasttc.benchmarks import record
from fasttc.benchmarks.ops.roofs import measure_roofs
from fasttc.models.linear import freeze, layer_weights, unembedding

from . import case
from .judge import Verdict, table, verdict
from .replicated import Replicated
from .tasks import PROMPT_SEED, compare, operations

GEMMA = case.Shape(26, 2304, 8, 4, 256, 9216, 256_000, 16_384, 70, context=8192)
TOY = case.Shape(2, 32, 2, 1, 16, 48, 64, 64, 6, context=64)


class Bench:
    """One model on one device, timed with the device idle at both ends.

    Args:
        device: cuda or, for a rehearsal, cpu.
        shape: of the model.
        seed: of its weights.
    """

    def __init__(self, device: str, shape: case.Shape, seed: int) -> None:
        self.device, self.shape = device, shape
        self.dtype = torch.bfloat16
        self.model = case.build_model(shape, seed, device).to(self.dtype)
        tcs = case.top_k_set(self.model, shape.features, shape.active, seed + 1, device)
        self.tcs = tcs.to(device, self.dtype)

    def prompt(self, tokens: int) -> torch.Tensor:
        return case.prompt(tokens, self.shape.vocabulary, PROMPT_SEED)

    def timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self._wait()
        start = time.perf_counter()
        result = call()
        self._wait()
        return time.perf_counter() - start, result

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def graph(self, tokens: int, targets: int, dtype: torch.dtype | None = None) -> fasttc.Graph:
        return fasttc.attribute(
            self.model,
            self.tcs,
            self.prompt(tokens),
            max_feature_nodes=targets,
            weight_dtype=dtype or self.dtype,
        )

    def phases(self, tokens: int, targets: int) -> dict[str, float]:
        """Seconds of each step of ``attribute``."""
        spent: dict[str, float] = {}

        def step(name: str, call: Callable[[], Any]) -> Any:
            spent[name], result = self.timed(call)
            return result

        model, sites = self.model, self.tcs.sites
        weights = step("weights", lambda: layer_weights(model, dtype=self.dtype))
        frozen = step(
            "forward", lambda: freeze(model, self.prompt(tokens), sites, dtype=torch.float32, weights=weights)
        )
        sources = step("encode", lambda: find_sources(frozen, self.tcs))
        linear = step("linearize", lambda: linearize(frozen, self.tcs))
        resolver = Resolver(linear, sources, frozen.final, unembedding(model), None)
        roots = step("logits", lambda: resolver.roots(None, 10, 0.95))
        sweep = Sweep(linear, sources, make_budget(None, frozen.embedding.device))
        options = {"share": 1.0, "limit": targets, "refresh": 2048}
        kept, writer = step("sweep and ranking", lambda: collect_rows(sweep, roots, **options))
        step("finish", lambda: _finish(kept, writer, len(roots)))
        return spent

    def peak(self, call: Callable[[], Any]) -> int:
        """Bytes at most, model included; 0 on the CPU."""
        if self.device != "cuda":
            call()
            return 0
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()


def _finish(kept: Kept, writer: EdgeWriter, n_roots: int) -> None:
    numbers = torch.full((kept.total + n_roots,), -1)
    nodes = slice(None) if kept.nodes is None else torch.tensor(kept.nodes)
    numbers[: kept.total][nodes] = torch.arange(kept.count)
    numbers[kept.total :] = kept.count + torch.arange(n_roots)
    writer.finish(numbers)


def measure(bench: Bench, tokens: int, long: int, targets: int, rounds: int, tiny: bool) -> dict[str, Any]:
    """Everything that is reported, as one row."""
    bench.graph(tokens, targets)
    runs = [bench.timed(lambda: bench.graph(tokens, targets)) for _ in range(rounds)]
    graph = runs[0][1]
    roofs = measure_roofs(bench.device, {"bfloat16"}, tiny)
    flops = 2 * operations(bench.model.config, bench.shape.features, graph, tokens)
    peak = bench.peak(lambda: bench.graph(long, targets))
    exact = bench.graph(tokens, targets, torch.float32)
    other = Replicated(bench.model, bench.tcs, bench.prompt(tokens), 16 if tiny else 256)
    order = graph.influence()[graph.feature_slice].argsort(descending=True)
    return {
        "tokens": tokens,
        "targets": targets,
        "features": graph.n_features,
        "edges": graph.n_edges,
        "seconds": statistics.median(seconds for seconds, _ in runs),
        "phases": bench.phases(tokens, targets),
        "roof": roofs.seconds(flops, 0, "bfloat16"),
        "long": long,
        "peak": peak,
        "replicated": bench.timed(lambda: other.run(graph.features[order]))[0],
        **compare(exact, graph),
    }


def judge(row: dict[str, Any]) -> list[Verdict]:
    gib = row["peak"] / 2**30
    ratio = row["replicated"] / row["seconds"]
    return [
        verdict(
            f"{row['targets']:,} feature targets at {row['tokens']} tokens",
            f"{row['seconds']:.2f} s (counted operations at the device's rate: {row['roof']:.2f} s)",
            "2 s",
            row["seconds"] <= 2,
        ),
        verdict(f"memory at {row['long']} tokens, model included", f"{gib:.1f} GiB", "24 GiB", gib <= 24),
        verdict("against circuit-tracer's algorithm", f"{ratio:.1f} × faster", "reported", True),
        verdict(
            "top 100 edges as with float32 weights", f"{row['overlap']:.0%}", "95 %", row["overlap"] >= 0.95
        ),
        verdict("sign flips among kept edges", f"{row['flips']:.3%}", "0.1 %", row["flips"] < 0.001),
    ]


def main(words: list[str]) -> int:
    parser = record.parser("attribution gpu", __doc__)
    parser.add_argument("--rehearse", action="store_true", help="a toy model on the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE/attribution.json")
    options = parser.parse_args(words)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("expected a GPU, found none; --rehearse runs everything on the CPU with a toy model")
    device = "cpu" if options.rehearse else "cuda"
    bench = Bench(device, TOY if options.rehearse else GEMMA, options.seed)
    sizes = (12, 24, 20) if options.rehearse else (64, 512, 8192)
    row = measure(bench, *sizes, 1 if options.rehearse else options.rounds, options.rehearse)
    print(json.dumps(row))
    environment = record.environment(device, options.seed)
    verdicts = judge(row)
    default = record.ROOT / "results" / record.device_folder(environment["device"]) / "attribution.json"
    head = {
        "kind": "attribution",
        "rehearsal": options.rehearse,
        "environment": environment,
        "targets": verdicts,
    }
    record.write(options.out or default, head, [row])
    print(table(verdicts))
    for name, seconds in row["phases"].items():
        print(f"  {name:20s} {seconds:8.4f} s")
    return 0 if all(found["met"] for found in verdicts) else 1
