"""Do a base's labels still hold? Feature by feature: what it reads, what it writes, when it fires, before and after."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fasttc._files import atomic_file
from fasttc.evaluation.metrics import row_cosines
from fasttc.models import check_match
from fasttc.nn import Transcoder, TranscoderSet
from fasttc.training.activations import activation_source
from fasttc.training.data import open_data

Verdict = Literal["kept", "changed", "dead", "newly used"]
VERDICTS = get_args(Verdict)
COLUMNS = (
    "layer",
    "feature",
    "verdict",
    "encoder_cosine",
    "decoder_cosine",
    "activation_correlation",
    "base_rate",
    "adapted_rate",
)


@dataclass(frozen=True)
class LayerCarryOver:
    """One layer; every tensor is [F], float64, on the CPU.

    Attributes:
        layer: of the model.
        encoder_cosine, decoder_cosine: between the feature's row and the base's.
        base_rate, adapted_rate: share of tokens on which the base's and the adapted feature are active, both on the
            fine-tuned model's inputs.
        activation_correlation: Pearson correlation of the two activations over these tokens; NaN where one is
            constant.
        least: smallest correlation and decoder cosine of a feature that is kept.
    """

    layer: int
    encoder_cosine: Tensor
    decoder_cosine: Tensor
    base_rate: Tensor
    adapted_rate: Tensor
    activation_correlation: Tensor
    least: float

    @property
    def verdicts(self) -> list[Verdict]:
        """Of every feature.

        "dead": the adapted feature is never active on these tokens. "newly used": it is, the base's never was.
        "kept": it fires as before and writes as before, by at least ``least``. "changed": one of these fails.
        """
        same = (self.activation_correlation >= self.least) & (self.decoder_cosine >= self.least)
        number = torch.where(same, 0, 1)
        number[self.base_rate == 0] = 3
        number[self.adapted_rate == 0] = 2
        return [VERDICTS[i] for i in number.tolist()]

    def counts(self) -> dict[Verdict, int]:
        """Features by verdict."""
        found = Counter(self.verdicts)
        return {verdict: found[verdict] for verdict in VERDICTS}


@torch.no_grad()
def carry_over(
    model: nn.Module,
    base: TranscoderSet,
    adapted: TranscoderSet,
    data: Any,
    *,
    tokenizer: Any = None,
    text: str | None = None,
    split: str = "test",
    tokens: int | None = 32_768,
    batch_size: int = 8,
    context: int = 128,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    split_seed: int = 0,
    least: float = 0.9,
) -> list[LayerCarryOver]:
    """Compares every adapted feature with the base's feature it came from.

    A label says when a feature fires and what it does. The first is carried over when base and adapted activations,
    on the same inputs, correlate; the second when the decoder rows point the same way.

    Args:
        model: the fine-tuned model; its MLP inputs are what both sets read.
        base, adapted: transcoders before and after, of the same layers and sizes.
        data, tokenizer, text, split, tokens, batch_size, context, fractions, split_seed: as in
            :func:`fasttc.evaluation.evaluate`.
        least: see :class:`LayerCarryOver`.

    Returns:
        One entry per layer. Deterministic for given data.

    Raises:
        ValueError: sets that do not fit each other or the model; data without tokens to measure.
    """
    if not 0 < least <= 1:
        raise ValueError(f"least: expected a number in (0, 1], got {least!r}")
    check_match(model, adapted, adapted.layers)
    check_same(base, adapted)
    opened = open_data(
        model, data, tokenizer, text=text, context=context, fractions=fractions, split_seed=split_seed
    )
    sums = [_Moments(before, after) for before, after in zip(base, adapted, strict=True)]
    with activation_source(model, adapted.sites) as source:
        for batch in opened.batches(split, batch_size, max_tokens=tokens):
            for total, x in zip(sums, source.read(batch)[0], strict=True):
                total.add(x)
    if sums[0].tokens == 0:
        raise ValueError("data: expected documents of at least two tokens, got none in what was read")
    return [total.result(layer, least) for total, layer in zip(sums, adapted.layers, strict=True)]


def check_same(base: TranscoderSet, tcs: TranscoderSet) -> None:
    """ValueError unless both sets have the same layers and sizes."""
    if base.layers != tcs.layers:
        raise ValueError(f"base: expected transcoders of layers {tcs.layers}, got {base.layers}")
    for site, ours, theirs in zip(tcs.sites, tcs, base, strict=True):
        for name in ("W_enc", "W_dec"):
            expected, got = list(getattr(ours, name).shape), list(getattr(theirs, name).shape)
            if expected != got:
                raise ValueError(f"base: layer {site.layer}: expected {name} {expected}, got {got}")


class _Moments:
    """Sums over tokens of base and adapted activations, [F] float64."""

    def __init__(self, base: Transcoder, adapted: Transcoder) -> None:
        self._sides = (base, adapted)
        make = {"dtype": torch.float64, "device": adapted.W_enc.device}
        # base, adapted: how often active, sum, sum of squares; and the sum of products
        self._sums = torch.zeros(2, 3, adapted.n_features, **make)
        self._products = torch.zeros(adapted.n_features, **make)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        keys, values = [], []
        for sums, transcoder in zip(self._sums, self._sides, strict=True):
            mode = transcoder.training
            token, feature, value = transcoder.eval().encode(x.to(transcoder.W_enc.device)).active()
            transcoder.train(mode)
            value = value.double()
            for total, part in zip(sums, (torch.ones_like(value), value, value.square()), strict=True):
                total.index_add_(0, feature.to(total.device), part.to(total.device))
            keys.append((token * transcoder.n_features + feature).to(sums.device))
            values.append(value.to(sums.device))
        # Entries ascend by token and feature, so what both hold is found by one search.
        at = torch.searchsorted(keys[0], keys[1]).clamp(max=max(len(keys[0]) - 1, 0))
        both = keys[0][at] == keys[1] if len(keys[0]) else torch.zeros_like(keys[1], dtype=torch.bool)
        feature = keys[1][both] % len(self._products)
        self._products.index_add_(0, feature, values[0][at[both]] * values[1][both])
        self.tokens += len(x)

    def result(self, layer: int, least: float) -> LayerCarryOver:
        base, adapted = self._sides
        n = self.tokens
        (count_a, sum_a, square_a), (count_b, sum_b, square_b) = self._sums.cpu()
        covariance = self._products.cpu() - sum_a * sum_b / n
        variance_a, variance_b = square_a - sum_a.square() / n, square_b - sum_b.square() / n
        return LayerCarryOver(
            layer,
            row_cosines(adapted.W_enc, base.W_enc),
            row_cosines(adapted.W_dec, base.W_dec),
            count_a / n,
            count_b / n,
            covariance / (variance_a * variance_b).clamp(min=0).sqrt(),
            least,
        )


def write_table(layers: Sequence[LayerCarryOver], path: Path) -> None:
    """All features of all layers as CSV with the columns :data:`COLUMNS`; whole or absent."""
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for layer in layers:
            numbers = [getattr(layer, name).tolist() for name in COLUMNS[3:]]
            for feature, (verdict, *row) in enumerate(zip(layer.verdicts, *numbers, strict=True)):
                rows.writerow([layer.layer, feature, verdict, *(f"{value:.6g}" for value in row)])


def summary(layers: Sequence[LayerCarryOver]) -> list[dict[str, Any]]:
    """A line per layer for a table: features by verdict, and what is kept of what is used."""
    lines = []
    for layer in layers:
        counts = layer.counts()
        used = sum(counts.values()) - counts["dead"]
        lines.append({"layer": layer.layer, **counts, "kept of used": counts["kept"] / max(used, 1)})
    return lines
