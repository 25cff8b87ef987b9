"""Representation shift per class where the truth is known: diseases of the clinical world, base against FTFA.

    python -m benchmarks shift                       all seeds; JSON under benchmarks/results/cpu/

Fine-tuning teaches drugs of rare diseases, which the base never saw, and new drugs of some common ones; those of the
other common diseases stay. A document is a vignette that ends in "the drug is", its class the disease; what stands for
it is the last token. Models are those of ``fasttc demo``, made where --folder does not hold them (with the transcoders
that ``python -m benchmarks circuits --folder`` needs too).
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fasttc.benchmarks import record

if TYPE_CHECKING:
    from .world import CircuitWorld

GROUPS = ("rare", "common, drug changed", "common, drug as before")
FIGURES = ("shift", "own", "own_by_chance", "cosine")


def measure(home: "CircuitWorld", prompts: int) -> list[dict[str, Any]]:
    """A row for every group of diseases and layer: figures averaged over its diseases."""
    from fasttc.analysis import representation_shift

    world = home.world
    groups = dict.fromkeys(world.common, GROUPS[2]) | dict.fromkeys(world.rare, GROUPS[0])
    groups |= dict.fromkeys(world.changed, GROUPS[1])
    drawn = world.prompts("two_hop", prompts, phase="finetuned", held_out=False, seed=5)
    names = [world.values["disease"][prompt.disease] for prompt in drawn]
    texts = [prompt.text for prompt in drawn]
    tuned, base = home.tuned, home.base
    report = representation_shift(
        tuned.model, base.model, texts, names, tuned.tokenizer, pool="last", context=64, seed=home.seed
    )
    group_of = {world.values["disease"][disease]: group for disease, group in groups.items()}
    rows = []
    for layer in report.layers[1:]:  # the embedding of the last token is the same for all
        for group in GROUPS:
            own = [one for one in layer.classes if group_of[one.name] == group]
            figures = {name: sum(getattr(one, name) for one in own) / len(own) for name in FIGURES}
            shifts = [one.shift for one in own]
            rows.append(
                {"seed": home.seed, "layer": layer.layer, "group": group, "classes": len(own), **figures}
                | {"least": min(shifts), "most": max(shifts), "silhouette_base": layer.silhouette_base}
                | {"silhouette_tuned": layer.silhouette_tuned}
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Every group at the last layer; figures are means over diseases, least and greatest of the seeds."""
    last = max(row["layer"] for row in rows)
    lines = [
        f"| diseases | how many | shift at layer {last} | of single diseases | own | own, by chance | cosine |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for group in GROUPS:
        own = [row for row in rows if row["group"] == group and row["layer"] == last]
        single = f"{min(row['least'] for row in own):.1f} to {max(row['most'] for row in own):.1f}"
        shift, *others = (_range([row[name] for row in own]) for name in FIGURES)
        cells = [group, str(own[0]["classes"]), shift, single, *others]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))


def main(arguments: list[str] | None = None) -> int:
    parser = record.parser("shift", __doc__)
    parser.add_argument(
        "--folder", type=Path, help="of the models, w0, w1, ...; default: a new one, removed at the end"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=record.ROOT / "results/cpu/shift.json")
    options = parser.parse_args(arguments)
    from .world import CircuitWorld

    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(options.seeds):
            folder = (options.folder or Path(temporary)) / f"w{seed}"
            rows += measure(CircuitWorld(folder, seed), options.prompts)
    record.write(options.out, {"kind": "shift", "environment": record.environment("cpu", 0)}, rows)
    print(table(rows))
    return 0
