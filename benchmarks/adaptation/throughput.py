"""PAT's tokens per second without the model's forward, against a plain PyTorch loop of the same mathematics.

    python -m benchmarks throughput                F = 8192, K = 32, D = 256, six layers; JSON below results/cpu

Both train on the same random activations, in turns: ours is the loop that ``fasttc adapt`` runs (encode, decode, loss,
gradients, clipping, Adam, dead features), theirs is dense eager PyTorch (linear, top-k, scatter, matrix product,
autograd, clipping, Adam). Exits with 1 below the target of 2.5 times.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttc.benchmarks import record
from fasttc.nn import Transcoder
from fasttc.training.distributed import Processes
from fasttc.training.transcoding import Objective, TranscoderTask

LAYERS, D, N_FEATURES, K = 6, 256, 8192, 32
TARGET = 2.5
RATE = 1e-4
Block = tuple[list[Tensor], list[Tensor]]


def ours(transcoders: list[Transcoder], block: Block) -> Callable[[], Any]:
    """One update of all layers by the library."""
    source: Any = SimpleNamespace(processes=Processes())  # activations are given
    task = TranscoderTask(transcoders, source, Objective(dead_after=10**9), [(1.0, 1.0)] * LAYERS)

    def step() -> Tensor:
        metrics = task.backward(block)
        task.optimiser.step(RATE)
        task.after_update(metrics)
        return metrics["loss"]

    return step


def plain(transcoders: list[Transcoder], block: Block) -> Callable[[], Any]:
    """The same by dense PyTorch."""
    modules = nn.ModuleList(transcoders)
    optimiser = torch.optim.Adam(modules.parameters(), lr=RATE, fused=True)

    def step() -> Tensor:
        losses = []
        for t, x, y in zip(transcoders, *block, strict=True):
            z = F.linear(x, t.W_enc, t.b_enc).relu()
            top = z.topk(K, dim=-1)
            acts = torch.zeros_like(z).scatter(1, top.indices, top.values)
            error = acts @ t.W_dec + t.b_dec - y
            loss = error.square().sum() / (y - y.mean(0)).square().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(t.parameters(), 1.0)
            losses.append(loss.detach())
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()

    return step


def main(arguments: list[str] | None = None) -> int:
    parser = record.parser("throughput", __doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="in one update")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=record.ROOT / "results/cpu/throughput.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    xs, ys = ([torch.randn(options.tokens, D) for _ in range(LAYERS)] for _ in range(2))
    steps = {}
    for name, make in (("fasttc", ours), ("plain PyTorch", plain)):
        torch.manual_seed(options.seed)
        steps[name] = make([Transcoder(D, N_FEATURES, k=K) for _ in range(LAYERS)], (xs, ys))
    first = {name: float(step()) for name, step in steps.items()}
    if abs(first["fasttc"] - first["plain PyTorch"]) > 1e-4 * first["plain PyTorch"]:
        print(f"expected equal losses of the first step, got {first}")
        return 1
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    rows = []
    for name, seconds in times.items():
        rate = options.tokens / statistics.median(seconds)
        rows.append({"name": name, "tokens_per_second": rate, "seconds": seconds})
        print(f"{name:14s} {rate:9,.0f} tokens/s")
    ratio = rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"]
    verdict = "met" if ratio >= TARGET else "missed"
    print(f"{verdict}: {ratio:.2f} times as many tokens per second (at least {TARGET})")
    shape = {"layers": LAYERS, "D": D, "F": N_FEATURES, "K": K, "tokens": options.tokens}
    head = {"kind": "throughput", "environment": record.environment("cpu", options.seed), "shape": shape}
    record.write(options.out, {**head, "ratio": ratio}, rows)
    return int(ratio < TARGET)
