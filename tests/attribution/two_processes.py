"""Run by test_processes.py in two processes: RANK FOLDER. Writes what each process found into FOLDER."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed

import fasttc
from fasttc.attribution import attribute_many, team
from fasttc.attribution.trace import Sweep
from fasttc.models import load

IDS = [2, 17, 9, 33, 5, 51, 28, 9, 40]
CASES = {
    "all": {},
    "ranked": {"max_feature_nodes": 30, "refresh": 8},
    "top_mass": {"edge_share": 0.7},
    "narrow": {"memory_budget": 60_000},
    "few": {"targets": [5], "max_feature_nodes": 1},
}


def message(call) -> str:
    """What ``call`` raises."""
    try:
        call()
    except (ValueError, ConnectionError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def breaking(rank: int, kind: str):
    """Cohorts whose second one goes wrong in process 1."""
    trace, count = Sweep._trace, iter(range(10**6))

    def broken(*args):
        if rank == 1 and next(count) == 1:
            if kind == "dies":
                os._exit(3)
            raise MemoryError("no room")
        return trace(*args)

    return broken


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, _ = load(folder / "model")
    tcs = fasttc.TranscoderSet.from_pretrained(folder / "transcoders")
    for name, options in CASES.items():
        for turn in range(2):
            fasttc.attribute(model, tcs, IDS, **options).save(folder / f"{name}.{turn}.{rank}")
    for number, graph in enumerate(attribute_many(model, tcs, [IDS[:4], IDS[3:]])):
        graph.save(folder / f"many{number}.0.{rank}")

    told = {"bad target": message(lambda: fasttc.attribute(model, tcs, IDS, targets=[99]))}
    told["prompts"] = message(lambda: fasttc.attribute(model, tcs, IDS[rank:]))
    told["on their own"] = message(lambda: fasttc.attribute(model, tcs, IDS[rank:], distributed=False))
    told["afterwards"] = message(lambda: fasttc.attribute(model, tcs, IDS))
    small = {} if rank == 0 else {"targets": [99]}
    told["one fails early"] = message(lambda: fasttc.attribute(model, tcs, IDS, **small))
    working = Sweep._trace
    Sweep._trace = breaking(rank, "fails")
    try:
        told["one fails"] = message(lambda: fasttc.attribute(model, tcs, IDS, memory_budget=60_000))
    except MemoryError as error:
        told["one fails"] = f"own: {error}"
    (folder / f"told.{rank}.json").write_text(json.dumps(told))
    team.PATIENCE = 5.0
    Sweep._trace = breaking(rank, "dies")
    told["one dies"] = message(lambda: fasttc.attribute(model, tcs, IDS, memory_budget=60_000))
    Sweep._trace = working
    (folder / f"told.{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
