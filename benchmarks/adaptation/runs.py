"""One run of the adaptation ledger: a mode, a budget and a seed, measured on test documents; and its search.

Options are chosen on validation documents, one after the other, by the same rule for training from scratch and for
adapting (:meth:`Bench.search`). Every budget of every mode is a run of its own, with its own annealed schedule.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fasttc.evaluation import evaluate
from fasttc.nn import Transcoder, TranscoderSet
from fasttc.training import AdaptOptions, ScratchOptions, TokenData, adapt, train
from fasttc.training.activations import RememberedSource
from fasttc.training.memory import estimate
from fasttc.training.quality import LayerQuality, mean_fvu, measure
from fasttc.training.scratch import INITIAL_TOKENS, default_lr

from .costs import Shape, training_flops
from .world import ROWS

ADAPTING = ("closed form", "PAT", "closed form + PAT")
MODES = ("unadapted", *ADAPTING, "scratch")
Config = dict[str, Any]
START: Config = {"lr": 1.0, "update_tokens": 64, "refit": "last"}
START_ADAPTING: Config = {**START, "lr": 0.25}
LADDERS: dict[str, tuple[float, ...]] = {  # each climbed from where the search stands for as long as it helps
    "lr": tuple(2.0**i for i in range(-6, 4)),  # times the default of fasttc.training
    "update_tokens": (32, 64, 128, 256, 512, 1024),
}
SEARCHED = ("lr", "update_tokens", "refit", "lr")
REFITS = (None, "first", "last", "both")
SEARCH_SEED = 1000
FVU_TOKENS, KL_TOKENS, VALIDATION_TOKENS = 16_384, 4096, 8192


@dataclass(frozen=True)
class Cell:
    """One kind of pair, fixed in advance. Scratch has no coverage and no quality: it knows no base."""

    distance: str
    coverage: str = ""
    quality: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in (self.coverage, self.distance, self.quality) if part)


class Bench:
    """Runs on one fine-tuned model, whose activations are remembered.

    Args:
        model: the fine-tuned one.
        data: medical text, split by document.
        source: of its activations.
        n_features, k: of every transcoder.
    """

    def __init__(
        self, model: Any, data: TokenData, source: RememberedSource, *, n_features: int, k: int
    ) -> None:
        self.model, self.data, self.source = model, data, source
        self.shape = Shape.of(model, n_features, k)
        self._sizes = {"n_features": n_features, "k": k}
        self._forward = self._time_forward()

    def _time_forward(self, blocks: int = 6) -> float:
        """CPU seconds of the model's forward for a token."""
        batches = list(self.data.batches("train", ROWS, max_tokens=blocks * ROWS * self.data.context))
        started = time.process_time()
        for batch in batches:
            self.source.source.read(batch)
        return (time.process_time() - started) / sum(batch.n_tokens for batch in batches)

    def fit(
        self, mode: str, tokens: int, seed: int, config: Config, base: TranscoderSet | None
    ) -> tuple[TranscoderSet, Any]:
        """(transcoders, report) of one training."""
        options = {
            "tokens": tokens, "seed": seed, "validation_tokens": VALIDATION_TOKENS, "batch_size": ROWS,
            "source": self.source, "progress": False, **config,
        }  # fmt: skip
        if "lr" in options:
            options["lr"] *= default_lr(self.shape.d_in)
        if mode == "scratch":
            return train(self.model, self.data, **self._sizes, **options)
        assert base is not None, "an adaptation has a base"
        return adapt(self.model, base, self.data, **options)

    def run(
        self, mode: str, tokens: int, seed: int, config: Config, base: TranscoderSet | None
    ) -> dict[str, Any]:
        """A run and its figures on test documents."""
        if mode == "unadapted":
            assert base is not None, "an adaptation has a base"
            return self._measured(base)
        waited, started = self.source.seconds, time.process_time()
        tcs, report = self.fit(mode, tokens, seed, config, base)
        seconds = time.process_time() - started - (self.source.seconds - waited)
        seen = report.tokens + (INITIAL_TOKENS if mode == "scratch" else 0)
        return {
            "tokens": seen,
            "fvu_validation": report.fvu,
            "refits": report.refits,
            "cpu_seconds": seconds + seen * self._forward,
            "cpu_seconds_without_model": seconds,
            "flops": training_flops(
                self.shape, seen, report.config.get("update_tokens"), config.get("refit")
            ),
            "peak_bytes": self.memory(mode, tokens, config),
            **self._measured(tcs),
        }

    def memory(self, mode: str, tokens: int, config: Config) -> int:
        """Bytes at a training's peak beside model and base: the estimate that ``fasttc bench memory`` checks."""
        given = {"tokens": tokens, "batch_size": ROWS, "validation_tokens": VALIDATION_TOKENS}
        given |= {name: value for name, value in config.items() if name != "lr"}
        options = ScratchOptions(**given) if mode == "scratch" else AdaptOptions(**given)
        make = {"n_features": self._sizes["n_features"], "k": self._sizes["k"], "device": "meta"}
        tcs = [Transcoder(self.shape.d_in, **make) for _ in range(self.shape.layers)]
        return estimate(self.model, tcs, options, self.data.context).total

    def fvu(self, tcs: TranscoderSet) -> float:
        """Mean over layers, on test documents."""
        return mean_fvu(self._layers(tcs))

    def _layers(self, tcs: TranscoderSet) -> list[LayerQuality]:
        return measure(self.source, list(tcs), self.data.batches("test", ROWS, max_tokens=FVU_TOKENS))

    def _measured(self, tcs: TranscoderSet) -> dict[str, Any]:
        layers = self._layers(tcs)
        replaced = evaluate(self.model, tcs, self.data, tokens=KL_TOKENS, per_layer=False)
        names = ("kl", "top1_error", "ce_original", "ce_replaced", "ce_ablated")
        return {
            "fvu": mean_fvu(layers),
            "fvu_layers": [layer.fvu for layer in layers],
            "l0": sum(layer.l0 for layer in layers) / len(layers),
            "dead": sum(layer.dead for layer in layers) / len(layers),
            **{name: getattr(replaced, name) for name in names},
        }

    def search(
        self,
        mode: str,
        tokens: int,
        base: TranscoderSet | None,
        start: Config,
        refits: Sequence[str | None],
        order: Sequence[str] = SEARCHED,
    ) -> dict[str, Any]:
        """The best options on validation documents, chosen one after the other in this order; from ``start``."""
        tried: list[dict[str, Any]] = []

        def fvu(config: Config) -> float:
            for row in tried:
                if row["config"] == config:
                    return row["fvu_validation"]
            found = self.fit(mode, tokens, SEARCH_SEED, config, base)[1].fvu
            tried.append({"config": config, "fvu_validation": found})
            return found

        best = start
        for name in order:
            if name == "refit":
                best = min(({**best, name: value} for value in (best[name], *refits)), key=fvu)
            else:
                best = _climb(best, name, fvu)
        return {"tokens": tokens, "config": best, "fvu_validation": fvu(best), "tried": tried}


def _climb(start: Config, name: str, fvu: Callable[[Config], float]) -> Config:
    """Goes up or down one ladder while the FVU falls."""
    ladder, best = LADDERS[name], start
    for direction in (1, -1):
        place = ladder.index(best[name]) + direction
        while 0 <= place < len(ladder) and fvu({**best, name: ladder[place]}) < fvu(best):
            best = {**best, name: ladder[place]}
            place += direction
        if best is not start:
            break
    return best
