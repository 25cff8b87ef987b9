"""What a training reports: everything a table or a ledger needs, as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fasttc.training.data import TokenData
from fasttc.training.loop import Outcome
from fasttc.training.quality import LayerQuality, mean_fvu


@dataclass(frozen=True)
class Report:
    """Common to every training.

    Attributes:
        kind: "scratch", "adapt" or "finetune".
        steps: optimiser steps.
        tokens: tokens the model processed in them, BOS included, padding not, repeats counted.
        epochs: complete passes over the training documents.
        seconds: in the loop, over all sittings; measurements before and after are not in it.
        documents: how many documents were in each split.
        seed: of the run.
        config: the options, defaults filled in; text, context and split are those of the data.
        last: metrics averaged over the last steps.
        stopped: why it ended before its budget (the loss diverged at a step, or held-out quality got no better), and
            which step's weights it ended with. Empty otherwise.
    """

    kind: str
    steps: int
    tokens: int
    epochs: int
    seconds: float
    documents: dict[str, int]
    seed: int
    config: dict[str, Any]
    last: dict[str, Any] = field(repr=False)
    stopped: str = field(default="", kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self)


@dataclass(frozen=True)
class TranscoderReport(Report):
    """Of transcoders trained from scratch or adapted.

    Attributes:
        layers: quality on held-out (validation) documents, per layer.
        before: the same before an adaptation: the base's transcoders on the fine-tuned model. Empty from scratch.
        refits: what closed forms did: :class:`fasttc.training.closed_form.Refits`.
    """

    layers: list[LayerQuality] = field(default_factory=list)
    before: list[LayerQuality] = field(default_factory=list)
    refits: dict[str, Any] = field(default_factory=dict)

    @property
    def fvu(self) -> float:
        """Mean over layers, held out."""
        return mean_fvu(self.layers)

    @property
    def l0(self) -> float:
        """Mean over layers, held out."""
        return sum(layer.l0 for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        before = {"fvu_before": mean_fvu(self.before)} if self.before else {}
        return super().to_dict() | {"fvu": self.fvu, "l0": self.l0} | before


def common(kind: str, outcome: Outcome, data: TokenData, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of :class:`Report`; how ``data`` was read and split is what it says itself, not the options."""
    return {
        "kind": kind,
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "epochs": outcome.epochs,
        "seconds": outcome.seconds,
        "documents": {split: len(part) for split, part in data.splits.items()},
        "seed": seed,
        "config": {**config, **data.settings()},
        "last": outcome.metrics,
        "stopped": outcome.stopped,
    }


def table(layers: Sequence[LayerQuality]) -> str:
    """The layers as lines of text."""
    lines = ["layer    FVU     L0   dead"]
    lines += [f"{q.layer:5d} {q.fvu:6.3f} {q.l0:6.1f} {q.dead:6.1%}" for q in layers]
    return "\n".join(lines)
