"""The memory that PAT says it will need against what it needs, on a scaled-down Gemma-like shape.

    python -m benchmarks memory                 a few shapes, each in a process of its own; JSON below results/cpu

The estimate is printed before a training; this measures the peak of resident memory of one (Linux). Exits with 1 if one
is more than 15 % off.
"""

import argparse
import ctypes
import gc
import json
import subprocess
from pathlib import Path

import torch

from fasttc.benchmarks import record
from fasttc.models import default_sites
from fasttc.models.build import build_causal_lm
from fasttc.nn import Transcoder, TranscoderSet
from fasttc.training import TokenData, adapt
from fasttc.training.activations import activation_source
from fasttc.training.adapt import AdaptOptions
from fasttc.training.closed_form import sample
from fasttc.training.memory import estimate

LARGEST_ERROR = 0.15
SHAPES = {  # name -> layers, D, F, K, refit
    "gradient steps": (6, 256, 8192, 32, None),
    "gradient steps, closed form last": (6, 256, 8192, 32, "last"),
    "closed form alone": (4, 256, 4096, 32, "only"),
}
TOKENS, ROWS, CONTEXT, VALIDATION = 8192, 16, 128, 128


def one(name: str, seed: int) -> dict[str, float]:
    """Estimated and measured bytes of one adaptation in this process."""
    layers, width, n_features, k, refit = SHAPES[name]
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    words = ["<pad>", "<bos>", *(f"t{i}" for i in range(510))]
    model, _ = build_causal_lm({"architecture": "llama", "config": sizes}, words, seed=seed)
    sites = default_sites(model)
    tcs = TranscoderSet([Transcoder(width, n_features, k=k) for _ in sites], sites)
    documents = torch.randint(3, 512, (120, 200)).tolist()
    data = TokenData(documents, context=CONTEXT, bos_id=1)
    with activation_source(model, sites) as source, torch.no_grad():
        for tc, y in zip(tcs, sample(source, data, "validation", ROWS, TOKENS)[1], strict=True):
            tc.W_dec.zero_()  # the mean alone: as good as adapt asks for
            tc.b_dec.copy_(y.mean(0))
    options = {"tokens": TOKENS, "batch_size": ROWS, "refit": refit, "validation_tokens": VALIDATION}
    expected = estimate(model, list(tcs), AdaptOptions(**options), CONTEXT)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the sample freed shall not hide what the training takes
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = record.resident("VmRSS")
    adapt(model, tcs, data, progress=False, lr=1e-5, **options)
    return {"expected": expected.total, "measured": record.resident("VmHWM") - before, **expected.parts}


def main(arguments: list[str] | None = None) -> int:
    parser = record.parser("memory", __doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=record.ROOT / "results/cpu/memory.json")
    parser.add_argument("--one", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(one(options.one, options.seed)))
        return 0
    rows = []
    for name in SHAPES:
        command = [*record.COMMAND, "memory", "--one", name, "--seed", str(options.seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        error = found["expected"] / found["measured"] - 1
        rows.append({"shape": name, **found, "error": error})
        sides = (f"{side} {found[side] / 1e6:.0f} MB" for side in ("expected", "measured"))
        print(f"{name:34s} {', '.join(sides)}: {error:+.1%}")
    record.write(
        options.out, {"kind": "memory", "environment": record.environment("cpu", options.seed)}, rows
    )
    return int(any(abs(row["error"]) > LARGEST_ERROR for row in rows))
