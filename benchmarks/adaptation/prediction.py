"""What PAT of Gemma-2-2b would cost on one H200, on paper: tokens, FLOPs, seconds and memory from the roofline.

    python -m benchmarks prediction

Nothing here is measured on that card: every figure printed is a prediction from the sizes of the model, the published
rates of the card and the shares of them that are assumed below.
"""

from dataclasses import dataclass

import torch

from fasttc.benchmarks import record
from fasttc.nn import Transcoder
from fasttc.training.adapt import AdaptOptions
from fasttc.training.memory import estimate

from .costs import Shape, adam_flops, forward_flops, step_flops

GEMMA = Shape(
    layers=26, d_in=2304, n_features=16_384, k=64, matrices=26 * (2 * 2304 * 2048 + 2 * 2304 * 1024 + 3 * 2304 * 9216),
    context=1024, width=2048,
)  # fmt: skip
PEAK_BF16, PEAK_FLOAT, PEAK_BYTES = (
    989e12,
    67e12,
    4.8e12,
)  # H200: dense bfloat16, float32, HBM3e; the maker's figures
SHARE_FLOPS, SHARE_BYTES = 0.5, 0.7  # of them that are assumed to be reached
PAPER = {
    "adapting": (1e6, 0.2),
    "from scratch": (1e9, 210.0),
}  # tokens, H100-hours, as the paper reports them


@dataclass(frozen=True)
class Run:
    """One training on paper.

    Attributes:
        name: of it.
        tokens: processed.
        update_tokens: in one update: Adam reads and writes all weights for each.
        closed_form: whether decoders are solved for at the end.
    """

    name: str
    tokens: float
    update_tokens: int
    closed_form: bool = False


RUNS = (
    Run("PAT, updates of 64 tokens, closed form last", 1e6, 64, closed_form=True),
    Run("PAT, updates of 64 tokens", 1e6, 64),
    Run("PAT, updates of 4,096 tokens", 1e6, 4096),
    Run("from scratch, updates of 4,096 tokens", 1e9, 4096),
)
SORTS, PRODUCTS = (
    16,
    80,
)  # passes over the pairs while sorting; products of a solve, four ridges of twenty steps


def seconds(run: Run, shape: Shape = GEMMA) -> dict[str, float]:
    """Predicted seconds by part: each the slower of its arithmetic and its traffic. Transcoders are float32."""
    rate, slow, traffic = (SHARE_FLOPS * PEAK_BF16, SHARE_FLOPS * PEAK_FLOAT, SHARE_BYTES * PEAK_BYTES)
    weights = shape.layers * 2 * shape.d_in * shape.n_features
    updates = run.tokens / run.update_tokens
    # Decode, the codes' gradient and two sums over tokens: K rows of four bytes each, for every token and layer.
    gathered = 4 * 4 * shape.k * shape.d_in * shape.layers
    encode = 2 * shape.d_in * shape.n_features * shape.layers
    return {
        "model forward": run.tokens * forward_flops(shape) / rate,
        "encode": run.tokens * encode / slow,
        "decode and gradients": run.tokens * max((step_flops(shape) - encode) / slow, gathered / traffic),
        "Adam": updates * max(adam_flops(shape) / slow, 32 * weights / traffic),  # weight, gradient, moments
        "closed form": _closed_form(run.tokens, shape, slow, traffic) if run.closed_form else 0.0,
    }


def _closed_form(tokens: float, shape: Shape, rate: float, traffic: float) -> float:
    """Pairs of codes sorted, then conjugate gradients with the full matrix of pairs."""
    pairs = shape.layers * tokens * shape.k * (shape.k + 1) / 2
    return 16 * SORTS * pairs / traffic + _solve_flops(shape) / rate


def _solve_flops(shape: Shape) -> float:
    return PRODUCTS * shape.layers * 2 * shape.n_features**2 * shape.d_in


def memory(refit: str | None, shape: Shape = GEMMA) -> tuple[float, str]:
    """Predicted bytes of PAT, the model in bfloat16 included; and the parts."""
    tcs = [
        Transcoder(shape.d_in, shape.n_features, k=shape.k, device="meta", dtype=torch.float32)
        for _ in range(shape.layers)
    ]
    options = AdaptOptions(tokens=10**6, batch_size=4, context=shape.context, refit=refit)
    found = estimate(_Sizes(), tcs, options, shape.context)
    return found.total + 2 * shape.matrices + 2 * 256_000 * shape.d_in, str(found)


class _Sizes:
    """What the estimate reads of Gemma-2-2b."""

    class config:
        hidden_size, intermediate_size, num_attention_heads = 2304, 9216, 8


def main(arguments: list[str] | None = None) -> int:
    record.parser("prediction", __doc__).parse_args(arguments)
    print("Gemma-2-2b, 26 layers x 16,384 features, K = 64, one H200. Every figure is a PREDICTION.\n")
    print(
        "| run | tokens | PFLOP | model s | encode s | decode, gradients s | Adam s | closed form s | GPU-hours |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for run in RUNS:
        parts = seconds(run)
        flops = run.tokens * (forward_flops(GEMMA) + step_flops(GEMMA))
        flops += run.tokens / run.update_tokens * adam_flops(GEMMA) + run.closed_form * _solve_flops(GEMMA)
        shown = " | ".join(f"{value:,.0f}" for value in parts.values())
        print(
            f"| {run.name} | {run.tokens:.0e} | {flops / 1e15:,.1f} | {shown} | {sum(parts.values()) / 3600:.3f} |"
        )
    for name, (tokens, hours) in PAPER.items():
        print(f"| the paper, {name} (reported, H100) | {tokens:.0e} | | | | | | | {hours} |")
    for refit, name in ((None, "without a closed form"), ("last", "with one")):
        total, parts = memory(refit)
        print(
            f"\nMemory of PAT {name} (prediction): {total / 1e9:.0f} GB with the model in bfloat16; {parts}"
        )
    return 0
