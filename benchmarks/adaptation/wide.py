"""Transcoders with a million features, shared out over processes: tokens per second, and memory against its estimate.

    python -m benchmarks wide                 F = 1,048,576, D = 64, K = 32, two processes; JSON below results/cpu

A few steps of ``train(..., shard_features=True)`` on one layer of a small random model, from the first draw of the
weights to the folder on disk, which is read back. No process ever holds all features: printed is the peak of resident
memory of each (Linux), beside the estimate that a training announces. Exits with 1 if one needs more than 15 % more.
"""

import argparse
import json
import os
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fasttc.benchmarks import record
from fasttc.models.build import build_causal_lm
from fasttc.nn import TranscoderConfig, io
from fasttc.training import ShardedTranscoder, TokenData, train
from fasttc.training.distributed import processes
from fasttc.training.memory import estimate
from fasttc.training.scratch import ScratchOptions

from .memory import LARGEST_ERROR

D, K, CONTEXT = 64, 32, 128


def one(options: argparse.Namespace) -> dict[str, Any]:
    """This process's part of the training: what it expected, what it needed, how fast all of them were."""
    torch.set_num_threads(1)
    sizes = {
        "hidden_size": D, "intermediate_size": 4 * D, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    words = ["<pad>", "<bos>", *(f"t{i}" for i in range(510))]
    model, _ = build_causal_lm({"architecture": "llama", "config": sizes}, words, seed=options.seed)
    torch.manual_seed(options.seed)
    data = TokenData(torch.randint(3, 512, (200, 200)).tolist(), context=CONTEXT, bos_id=1)
    group = processes()
    settings: dict[str, Any] = {
        "n_features": options.features, "k": K, "tokens": options.steps * options.rows * CONTEXT,
        "batch_size": options.rows, "validation_tokens": CONTEXT, "shard_features": True,
        "seed": options.seed,
    }  # fmt: skip
    share = ShardedTranscoder(TranscoderConfig(D, options.features, D, k=K), group, device="meta")
    expected = estimate(model, [share], ScratchOptions(**settings), CONTEXT)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = record.resident("VmRSS")
    # Without a checkpoint on the way: writing one copies weights and averages, which the estimate does not count.
    _, report = train(
        model, data, out=options.out, progress=False, checkpoint_every=options.steps, **settings
    )
    measured = record.resident("VmHWM") - before
    return {"rank": group.rank, "features": len(share.W_enc), "expected": expected.total, "measured": measured,
            "error": expected.total / measured - 1, "steps": report.steps, "tokens": report.tokens,
            "seconds": report.seconds, "parts": expected.parts}  # fmt: skip


def launch(options: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """The result of every process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ,
        "WORLD_SIZE": str(options.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    words = [f"--{name}={getattr(options, name)}" for name in ("features", "steps", "rows", "seed")]
    command = [*record.COMMAND, "wide", "--one", *words, f"--out={out}"]
    started = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(options.processes)
    ]
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a process failed: exit codes {[process.returncode for process in started]}")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def main(arguments: list[str] | None = None) -> int:
    parser = record.parser("wide", __doc__)
    parser.add_argument("--features", type=int, default=2**20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help=f"of {CONTEXT} tokens, in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=record.ROOT / "results/cpu/wide.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(one(options)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tcs"
        rows = launch(options, out)
        with safe_open(out / io.layer_file(0), "pt") as stored:
            shape = stored.get_slice("W_enc").get_shape()
    assert shape == [options.features, D], f"expected all features in the result, got {shape}"
    for row in rows:
        sides = f"expected {row['expected'] / 1e9:.2f} GB, measured {row['measured'] / 1e9:.2f} GB"
        print(f"process {row['rank']}: {row['features']:,} features, {sides} ({row['error']:+.1%})")
    rate = rows[0]["tokens"] / rows[0]["seconds"]
    print(
        f"{rows[0]['steps']} steps of {options.rows * CONTEXT} tokens: {rate:.0f} tokens/s with the model's forward"
    )
    head = {
        "kind": "wide",
        "environment": record.environment("cpu", options.seed),
        "shape": {"D": D, "F": options.features, "K": K, "processes": options.processes},
        "tokens_per_second": rate,
    }
    record.write(options.out, head, rows)
    return int(any(row["error"] < -LARGEST_ERROR for row in rows))
