"""Options that every training shares, and how keyword arguments become a checked, frozen configuration."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from fasttc.models import check_device
from fasttc.training.data import TokenData, open_data
from fasttc.training.optimiser import check_schedule

Refit = Literal["auto", "first", "last", "both", "only"] | None
REFITS = ("auto", "first", "last", "both", "only")
"""When a closed form gives the decoder."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of every training.

    Attributes:
        tokens: budget: tokens to process, repeats and BOS counted. Rounded up to whole steps of
            ``batch_size * context``; padding takes a few per cent of those.
        lr: Adam's learning rate at its height; None takes the documented default.
        batch_size: rows in a step.
        context: tokens in a row.
        text: how a record becomes text; see :func:`fasttc.training.documents.read_documents`.
        fractions: shares of documents for train, validation, test.
        split_seed: which documents go where. Keep it the same for all steps of a study.
        validation_tokens: held-out tokens for the report.
        warmup: share of the steps in which the rate rises.
        decay: "cosine", "linear" or "constant" after that.
        beta2: Adam's second decay rate.
        clip: largest gradient norm; 0: no clipping.
        seed: of initial weights and of the order of the data.
    """

    tokens: int = 1_000_000
    lr: float | None = None
    batch_size: int = 8
    context: int = 128
    text: str | None = None
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05)
    split_seed: int = 0
    validation_tokens: int = 16_384
    warmup: float = 0.05
    decay: str = "cosine"
    beta2: float = 0.999
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "validation_tokens"):
            self.positive_int(name)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed: expected an int, got {self.seed!r}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a number > 0, got {self.lr!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share of the steps in [0, 1), got {self.warmup!r}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2: expected a number in [0, 1), got {self.beta2!r}")
        if not self.clip >= 0:
            raise ValueError(f"clip: expected a number >= 0, got {self.clip!r}")
        check_schedule(self.decay)
        object.__setattr__(self, "fractions", tuple(self.fractions))

    def positive_int(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")

    def steps(self, context: int, taken: int = 0) -> int:
        """Blocks for the budget less ``taken`` tokens."""
        return max(0, math.ceil((self.tokens - taken) / (self.block_rows * context)))

    @property
    def block_rows(self) -> int:
        """Rows in a block of the stream."""
        return self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """JSON types, so that it compares equal to what a checkpoint gives back."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def open(self, model: nn.Module, data: Any, tokenizer: Any) -> TokenData:
        """The data with its split. A ``TokenData`` keeps its own context and split."""
        return open_data(model, data, tokenizer, **self.data_options())

    def data_options(self) -> dict[str, Any]:
        """Those for :func:`fasttc.training.data.open_data`."""
        return {name: getattr(self, name) for name in ("text", "context", "fractions", "split_seed")}


@dataclass(frozen=True, kw_only=True)
class TranscoderOptions(TrainingOptions):
    """Options of every training of transcoders.

    Attributes:
        device: where transcoders are trained, for example "cuda:1"; None: where the model has their layer.
        buffer: batches whose activations are held in memory, mixed, and only then given out: tokens of an update then
            come from that many more documents. Costs ``8 D`` bytes for every token and layer, no forward.
        update_tokens: tokens in one update. A block (``buffer * batch_size * context``) larger than that is mixed and
            shared out over several updates, which costs no further forward of the model. None: a batch.
        patience: looks at held-out FVU (on 4096 validation tokens; twenty in the whole budget) without a new best
            after which training stops, with the best weights; also if the loss diverges. None: no looks; a loss that
            diverges ends with the weights of the last checkpoint, or, if there is none, with an error.
        refit: closed-form decoders (:mod:`fasttc.training.refit`): "first", before training, on ``refit_tokens``;
            "last", after it, from the codes it made on the way (from scratch: in its second half), which costs no
            token; "both"; "only", on the whole budget, without a gradient step and so without a checkpoint (``resume``
            begins anew); None. "auto": "last" for an adaptation that trains decoders, else None.
        refit_tokens: part of the budget for the first refit; None: a quarter of it, at most 2^20.
        whiten: encoders learn on centred, half-whitened inputs (:mod:`fasttc.training.whitening`). Not where the
            encoder or its bias is frozen, nor where there is no gradient step.
        shard_features: of several processes each trains some features of every layer, instead of some layers: for
            layers too wide for one process. Without closed forms, which need all features in one place, and without
            BatchTopK.
    """

    device: str | None = None
    buffer: int = 1
    update_tokens: int | None = None
    patience: int | None = None
    refit: Refit = None
    refit_tokens: int | None = None
    whiten: bool = True
    shard_features: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device is not None:
            check_device(self.device)
        self.positive_int("buffer")
        for name in ("update_tokens", "patience", "refit_tokens"):
            if getattr(self, name) is not None:
                self.positive_int(name)
        if self.refit not in (*REFITS, None):
            raise ValueError(f"refit: expected one of {', '.join(REFITS)} or None, got {self.refit!r}")
        if self.shard_features and self.refit not in ("auto", None):
            raise ValueError(
                "refit: expected None with shard_features (a closed form needs all features in one place), "
                f"got {self.refit!r}"
            )
        if self.refit_tokens is not None and self.refit not in ("first", "both"):
            raise ValueError(f"refit_tokens: expected refit='first' or 'both' with it, got {self.refit!r}")
        if self.refit_tokens is not None and self.refit_tokens >= self.tokens:
            raise ValueError(
                f"refit_tokens: expected fewer than tokens = {self.tokens}, got {self.refit_tokens}"
            )

    def parts(self, context: int) -> int:
        """Updates for a block."""
        batch = self.batch_size * context
        return max(1, round(self.buffer * batch / (self.update_tokens or batch)))

    @property
    def block_rows(self) -> int:
        return self.buffer * self.batch_size

    def first_tokens(self) -> int:
        """Tokens of the budget that a closed form takes before training."""
        if self.refit == "only":
            return self.tokens
        share = min(self.tokens // 4, 2**20) if self.refit_tokens is None else self.refit_tokens
        return share if self.refit in ("first", "both") else 0

    def whitens(self, trained: Sequence[str] | None, skip: bool) -> bool:
        """Whether inputs are whitened, where ``trained`` are the names of what is trained (None: all)."""
        moved = {"W_enc", "b_enc", *(("W_skip", "b_dec") if skip else ())}
        return self.whiten and self.refit != "only" and (trained is None or moved <= set(trained))

    def settle(self, refit: Refit) -> None:
        """Takes ``refit`` for "auto"."""
        if self.refit == "auto":
            object.__setattr__(self, "refit", None if self.shard_features else refit)


Options = TypeVar("Options", bound=TrainingOptions)


def make_options(kind: type[Options], function: str, given: dict[str, Any]) -> Options:
    """Keyword arguments as a configuration; TypeError naming the options there are for one that does not exist."""
    known = [field.name for field in fields(kind)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{function}: unknown option {unknown[0]!r}; expected one of {', '.join(known)}")
    return kind(**given)


def run_folder(out: str | Path | None) -> Path | None:
    """``<out>.run``: where a training whose result goes to ``out`` keeps its checkpoint and its log."""
    if out is None:
        return None
    path = Path(out)
    return path.with_name(f"{path.name}.run")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global random generators start from ``seed`` inside and are put back after."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
