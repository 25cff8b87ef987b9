"""The adaptation ledger: what carrying transcoders over to a fine-tuned model costs beside training them from scratch.

    python -m benchmarks adaptation --data DATA                 everything: hours on one core; resumable
    python -m benchmarks adaptation --data DATA --quick         one seed, small budgets: under five minutes
    python -m benchmarks adaptation --report                    table, plot and JSON again from the runs there are

DATA holds models/stories260K (a Hugging Face folder) and pubmedqa/ori_pqal.json. Every run is a file below OUT/units:
what is there is not done again, so the same command goes on where it stopped, and several processes may share the
work by --only, once the first has made what they start from.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasttc._files import atomic_file
from fasttc.benchmarks import record

from . import report as adaptation_report
from .runs import MODES, REFITS, SEARCHED, START, START_ADAPTING, Bench, Cell, Config
from .world import Size, World


@dataclass(frozen=True)
class Plan:
    """What is run. Fixed in advance; the first cells are those of the headline.

    Attributes:
        size: of what the runs start from.
        budgets: of each mode, in tokens.
        search, scratch_search: tokens of the searches, adapting and from scratch: each is for budgets from its own
            tokens on, up to those of the next; the first also for smaller ones.
        cells: of the adaptations.
        seeds: of initial weights and of the order of the data; model pairs and base transcoders are one each.
    """

    size: Size
    budgets: dict[str, tuple[int, ...]]
    search: tuple[int, ...]
    scratch_search: tuple[int, ...]
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]


_ADAPT = tuple(2560 * 2**i for i in range(7))
_SCRATCH = tuple(20_480 * 2**i for i in range(7))
FULL = Plan(
    Size(2500, {"long": 2_621_440, "short": 327_680}, {"mild": (102_400, 1e-4), "severe": (1_000_000, 1e-3)}),
    {
        "unadapted": (0,), "closed form": _ADAPT[::2], "PAT": _ADAPT[1::2], "closed form + PAT": _ADAPT,
        "scratch": _SCRATCH,
    },
    search=(20_480, 40_960),
    scratch_search=(81_920, 163_840, 655_360),
    cells=tuple(
        Cell(distance, coverage, quality)
        for quality in ("long", "short")
        for distance, coverage in (
            ("mild", "covered"), ("severe", "covered"), ("severe", "uncovered"), ("mild", "uncovered")
        )
    ),
    seeds=(0, 1, 2),
)  # fmt: skip
_FEW = (5120, 20_480)
QUICK = Plan(
    Size(200, {"long": 61_440}, {"mild": (102_400, 1e-4)}),
    {
        "unadapted": (0,),
        "closed form": _FEW,
        "PAT": _FEW,
        "closed form + PAT": _FEW,
        "scratch": (20_480, 81_920),
    },
    search=(),
    scratch_search=(),
    cells=(Cell("mild", "covered", "long"), Cell("mild", "uncovered", "long")),
    seeds=(0,),
)


class Ledger:
    """Runs a plan, unit by unit.

    Args:
        plan, world: what to run and where it starts from.
        folder: of the units' files.
        wanted: whether a unit of this name is to be run here.
    """

    def __init__(self, plan: Plan, world: World, folder: Path, wanted: Callable[[str], bool]) -> None:
        self.plan, self.world, self.folder, self.wanted = plan, world, folder, wanted
        folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        for seed in self.plan.seeds:
            for distance in self.plan.size.distances:
                if any(self._missing(distance, seed)):
                    self._distance(distance, seed)

    def _missing(self, distance: str, seed: int) -> Iterator[str]:
        for _, _, _, name in self._units(distance, seed):
            if self.wanted(name) and not self._file(name).is_file():
                yield name

    def _units(self, distance: str, seed: int) -> Iterator[tuple[Cell, str, int, str]]:
        """(cell, mode, tokens, name) of one fine-tuned model and seed."""
        cells = [cell for cell in self.plan.cells if cell.distance == distance]
        for mode in MODES:
            for cell in [Cell(distance)] if mode == "scratch" else cells:
                for tokens in self.plan.budgets[mode]:
                    yield cell, mode, tokens, f"{mode.replace(' ', '')}_{cell}_{tokens}_seed{seed}"

    def _distance(self, distance: str, seed: int) -> None:
        model = self.world.tuned(distance)
        with self.world.activations(model) as source:
            sizes = {"n_features": self.world.n_features, "k": self.world.k}
            bench = Bench(model, self.world.medical, source, **sizes)
            for cell, mode, tokens, name in self._units(distance, seed):
                if self.wanted(name) and not self._file(name).is_file():
                    config = self._config(bench, cell, mode, tokens)
                    what = {"mode": mode, "cell": str(cell), "budget": tokens, "seed": seed, "config": config}
                    result = bench.run(mode, tokens, seed, config, self._base(cell))
                    self._write(name, {**what, **vars(cell), **result})

    def _base(self, cell: Cell) -> Any:
        return self.world.bases(cell.coverage, cell.quality) if cell.coverage else None

    def _config(self, bench: Bench, cell: Cell, mode: str, tokens: int) -> Config:
        """The options that the searches found for this cell and mode; where there is none, their start."""
        fixed = {"closed form": {"refit": "only"}, "unadapted": {}}
        if mode in fixed:
            return fixed[mode]
        scratch = mode == "scratch"
        config, refits = (START, REFITS) if scratch else (START_ADAPTING, REFITS[1:])
        if mode == "PAT":
            config, refits = {**config, "refit": None}, ()
        order = SEARCHED
        for step, budget in enumerate(self.plan.scratch_search if scratch else self.plan.search):
            if step == 0 or tokens >= budget:
                config = self._searched(bench, cell, mode, budget, config, refits, order)
                order = ("lr",)  # all that is searched anew
        return config

    def _searched(
        self,
        bench: Bench,
        cell: Cell,
        mode: str,
        tokens: int,
        start: Config,
        refits: Sequence[str | None],
        order: Sequence[str],
    ) -> Config:
        qualities = list(self.plan.size.qualities)
        quality = cell.quality and qualities[0]  # searched once for all qualities
        cell = Cell(cell.distance, cell.coverage, quality)
        name = f"search_{mode.replace(' ', '')}_{cell}_{tokens}"
        if not self._file(name).is_file():
            found = bench.search(mode, tokens, self._base(cell), start, refits, order)
            self._write(name, {"mode": mode, "cell": str(cell), **found})
        return json.loads(self._file(name).read_text(encoding="utf-8"))["config"]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with atomic_file(self._file(name)) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
        fvu = content.get("fvu", content.get("fvu_validation"))
        print(f"{name:60s} FVU {fvu:.4f}  {content['config']}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = record.parser("adaptation", __doc__)
    parser.add_argument("--data", type=Path, default=record.DATA)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/adaptation"), help="folder for runs and models"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, small budgets, no search")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--only", default="", help="only runs whose name holds one of these, comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument(
        "--results", type=Path, help="folder for JSON, table and plot; default: benchmarks/results/adaptation"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plan, out = (QUICK, options.out / "quick") if options.quick else (FULL, options.out)
    parts = options.only.split(",")
    if not options.report:
        if not (options.data / "models/stories260K").is_dir():
            print(f"--data: expected models/stories260K and pubmedqa below it, got {options.data}")
            return 2
        seeds = plan.seeds if options.seeds is None else tuple(options.seeds)
        ledger = Ledger(
            Plan(**{**vars(plan), "seeds": seeds}),
            World(options.data, out / "world", plan.size),
            out / "units",
            lambda name: any(part in name for part in parts),
        )
        ledger.run()
    default = out / "results" if options.quick else record.ROOT / "results/adaptation"
    return adaptation_report.write(out / "units", options.results or default)
