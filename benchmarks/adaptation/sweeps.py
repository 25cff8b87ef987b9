"""Around the ledger, in smaller runs: how width, distance and the target change what adapting is worth.

    python -m benchmarks sweeps width --data DATA       F from 256 to 4096: adapted against from scratch
    python -m benchmarks sweeps distance --data DATA    rate and steps of the fine-tuning: where PAT is not enough
    python -m benchmarks sweeps sae --data DATA         sparse autoencoders (target = input) beside transcoders
    python -m benchmarks sweeps inputs --data DATA      inputs as they are beside centred, half-whitened ones

One seed, options between those that the ledger's searches found, the same for all lines, figures of test documents.
Every line is a file below OUT: what is there is not done again.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttc._files import atomic_file
from fasttc.benchmarks import record
from fasttc.nn import TranscoderSet
from fasttc.training.activations import Source, WrappedSource
from fasttc.training.packing import TokenBatch

from .ledger import FULL
from .runs import Bench
from .world import Size, World

ADAPT = {"lr": 0.25, "update_tokens": 64, "refit": "last"}
SCRATCH = {"lr": 1.0, "update_tokens": 64, "refit": "last"}
ADAPT_TOKENS, SCRATCH_TOKENS, BASE_TOKENS = 10_240, (40_960, 81_920), 163_840
WIDTHS = (256, 512, 1024, 2048, 4096)
DISTANCES = {  # name -> tokens, learning rate of FTFA
    f"{steps} steps at {lr:g}": (1024 * steps, lr)
    for steps, lr in ((30, 1e-4), (100, 1e-4), (100, 1e-3), (100, 3e-3), (400, 1e-3))
}
Line = dict[str, Any]


class Inputs(WrappedSource):
    """A source whose targets are the inputs: what a sparse autoencoder sees."""

    def read(self, batch: TokenBatch) -> tuple[list[Tensor], list[Tensor]]:
        xs, _ = super().read(batch)
        return xs, xs


def _world(options: argparse.Namespace, n_features: int = 1024) -> World:
    size = Size(2500, {"sweep": BASE_TOKENS}, {**FULL.size.distances, **DISTANCES})
    return World(options.data, options.out / "world", size, n_features=n_features)


def _both_sides(bench: Bench, base: TranscoderSet, **options: Any) -> Line:
    """FVU adapted and from scratch, at the fixed budgets, with ``options`` of both trainings."""
    found: Line = {"unadapted": bench.fvu(base)}
    adapted = bench.fit("PAT", ADAPT_TOKENS, 0, {**ADAPT, **options}, base)[0]
    found[f"adapted, {ADAPT_TOKENS:,} tokens"] = bench.fvu(adapted)
    for tokens in SCRATCH_TOKENS:
        new = bench.fit("scratch", tokens, 0, {**SCRATCH, **options}, None)[0]
        found[f"scratch, {tokens:,} tokens"] = bench.fvu(new)
    return found


def _line(options: argparse.Namespace, tuned: str, n_features: int = 1024, **training: Any) -> Line:
    """Both sides on one fine-tuned model, the base covered; ``training``: options of both."""
    world = _world(options, n_features)
    model = world.tuned(tuned)
    with world.activations(model) as source:
        bench = Bench(model, world.medical, source, n_features=n_features, k=world.k)
        return _both_sides(bench, world.bases("covered", "sweep"), **training)


def width(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Line]]]:
    return ((f"F = {n}", lambda n=n: _line(options, "mild", n)) for n in WIDTHS)


def distance(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Line]]]:
    return ((name, lambda name=name: _line(options, name)) for name in DISTANCES)


def inputs(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Line]]]:
    ways = {"as they are": False, "centred, half whitened": True}
    return (
        (f"{name}, {way}", lambda name=name, whiten=whiten: _line(options, name, whiten=whiten))
        for name in FULL.size.distances
        for way, whiten in ways.items()
    )


def sae(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Line]]]:
    def line(target: str) -> Line:
        world = _world(options)
        model, data = world.tuned("mild"), world.medical
        wrap: Callable[[Source], Source] = Inputs if target == "input" else lambda source: source
        sizes = {"n_features": world.n_features, "k": world.k}
        with world.activations(world.base[0], wrap) as source:
            bench = Bench(world.base[0], data, source, **sizes)
            base = bench.fit("scratch", BASE_TOKENS, 0, SCRATCH, None)[0]
        with world.activations(model, wrap) as source:
            return _both_sides(Bench(model, data, source, **sizes), base)

    names = {"output": "transcoder: MLP input to output", "input": "sparse autoencoder: MLP input to itself"}
    return ((name, lambda target=target: line(target)) for target, name in names.items())


SWEEPS = {"width": width, "distance": distance, "sae": sae, "inputs": inputs}


def main(arguments: list[str] | None = None) -> int:
    parser = record.parser("sweeps", __doc__)
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--data", type=Path, default=record.DATA)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/adaptation"), help="folder for runs and models"
    )
    parser.add_argument("--only", default="", help="only lines whose name holds this")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = options.out / f"sweep_{options.sweep}"
    lines.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (name, make) in enumerate(SWEEPS[options.sweep](options)):
        path = lines / f"{i}.json"
        if not path.is_file() and options.only in name:
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps({"name": name, **make()}), encoding="utf-8")
        if path.is_file():
            rows.append(json.loads(path.read_text(encoding="utf-8")))
            print("  ".join(f"{key} {v:.4f}" if isinstance(v, float) else v for key, v in rows[-1].items()))
    head = {"kind": "sweep", "sweep": options.sweep, "environment": record.environment("cpu", 0)}
    record.write(record.ROOT / f"results/adaptation/{options.sweep}.json", head, rows)
    return 0
