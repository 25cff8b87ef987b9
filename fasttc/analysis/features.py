"""Evidence for what features stand for: where in a corpus they are active, how often, and what they read and write."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fasttc.analysis.largest import Largest
from fasttc.models import check_match, embedding_inputs, logit_directions
from fasttc.nn import TranscoderSet
from fasttc.training.activations import activation_source
from fasttc.training.data import TokenData, open_data
from fasttc.training.packing import TokenBatch

Array = NDArray[Any]

INTERVALS = 4
"""Parts of equal size, by activation, that a feature's sampled examples are shown in."""


@dataclass(frozen=True)
class Example:
    """A stretch of one document in which a feature is active.

    Attributes:
        tokens: token ids.
        activations: of the feature, one per token.
        peak: place of its largest activation in the document, in ``tokens``.
    """

    tokens: list[int]
    activations: list[float]
    peak: int


@dataclass(frozen=True)
class FeatureEvidence:
    """What a corpus and the weights say about one feature.

    Attributes:
        layer, index: the feature.
        n_tokens: tokens looked at.
        n_active: tokens on which it was active.
        maximum: largest activation; 0 where it never was active.
        mean: activation, over all tokens looked at.
        decoder_norm: length of the feature's decoder row.
        top: examples with the largest activations, falling, one per piece of a document.
        intervals: a uniform sample of all such examples in :data:`INTERVALS` parts, the strongest first.
        sample: ascending activations, a uniform sample of the active tokens.
        promoted, suppressed: token ids and direct effects on their logits, strongest first (the unit is that of
            :func:`fasttc.models.logit_directions`).
        embeddings: token ids and pre-activations (without bias) where the residual is their embedding alone.
    """

    layer: int
    index: int
    n_tokens: int
    n_active: int
    maximum: float
    mean: float
    decoder_norm: float
    top: list[Example] = field(repr=False)
    intervals: list[list[Example]] = field(repr=False)
    sample: list[float] = field(repr=False)
    promoted: list[tuple[int, float]] = field(repr=False)
    suppressed: list[tuple[int, float]] = field(repr=False)
    embeddings: list[tuple[int, float]] = field(repr=False)

    @property
    def rate(self) -> float:
        """Share of the tokens on which the feature is active."""
        return self.n_active / self.n_tokens

    @property
    def strength(self) -> float:
        """How much it writes: mean activation times norm of the decoder row."""
        return self.mean * self.decoder_norm


def feature_evidence(
    model: nn.Module,
    tcs: TranscoderSet,
    data: Any,
    features: Iterable[tuple[int, int]] | None = None,
    *,
    tokenizer: Any = None,
    text: str | None = None,
    split: str = "train",
    tokens: int | None = 1_000_000,
    batch_size: int = 32,
    context: int = 128,
    split_seed: int = 0,
    examples: int = 20,
    sampled: int = 20,
    before: int = 48,
    after: int = 16,
    n_tokens_listed: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> list[FeatureEvidence]:
    """Collects evidence for any set of features in one pass over a corpus.

    Every layer's transcoder sees each block once. Kept per feature are the ``examples`` strongest stretches, a
    uniform sample of ``sampled`` others and of 512 activations: memory does not grow with the corpus. The first token
    of a document and padding are left out, as everywhere. Features of adapters are looked at inside
    :func:`fasttc.hybrid`, where they run.

    Args:
        model: of a supported family; it is not changed.
        tcs: transcoders, or adapters, of all or some of its layers.
        data, tokenizer, text, context, split_seed: see :func:`fasttc.training.data.open_data`.
        features: (layer, index) pairs; None: all features of all layers.
        split: "train", "validation" or "test".
        tokens: stops after about so many; None: the whole split.
        batch_size: rows of ``context`` tokens in one forward.
        examples, sampled: examples kept per feature.
        before, after: tokens shown before and after a peak, of the same document.
        n_tokens_listed: length of the token lists.
        seed: of the samples.
        progress: shows a bar.

    Returns:
        Evidence in the order of ``features``, sorted and without repetitions. Deterministic on one machine.

    Raises:
        ValueError: transcoders that do not fit, a feature that does not exist, data without tokens.
    """
    check_match(model, tcs, tcs.layers)
    wanted = features_by_transcoder(tcs, features)
    opened = open_data(model, data, tokenizer, text=text, context=context, split_seed=split_seed)
    rng = np.random.default_rng(seed)
    collectors = [
        _Collector(chosen, tc.n_features, (examples, sampled), (before, after), rng) if len(chosen) else None
        for chosen, tc in zip(wanted, tcs, strict=True)
    ]
    seen = _read(model, tcs, opened, collectors, split, batch_size, tokens, progress)
    if not seen:
        raise ValueError("data: expected documents of at least two tokens, got none in what was read")
    found: list[FeatureEvidence] = []
    for number, (collector, chosen) in enumerate(zip(collectors, wanted, strict=True)):
        if collector is not None:
            lists = _token_lists(model, tcs, number, chosen, n_tokens_listed)
            norms = tcs[number].W_dec.detach()[torch.from_numpy(chosen)].double().norm(dim=1).tolist()
            found += collector.result(tcs.sites[number].layer, seen, norms, lists)
    return found


def features_by_transcoder(tcs: TranscoderSet, features: Iterable[tuple[int, int]] | None) -> list[Array]:
    """Ascending feature indices for each transcoder of the set."""
    if features is None:
        return [np.arange(tc.n_features) for tc in tcs]
    numbers = {layer: number for number, layer in enumerate(tcs.layers)}
    chosen: list[set[int]] = [set() for _ in tcs.layers]
    for layer, index in features:
        if layer not in numbers or not 0 <= index < tcs[numbers[layer]].n_features:
            widths = f"layers {tcs.layers}, {tcs[0].n_features} features each"
            raise ValueError(f"features: expected (layer, index) within {widths}, got ({layer}, {index})")
        chosen[numbers[layer]].add(index)
    if not any(chosen):
        raise ValueError("features: expected at least one (layer, index), got none")
    return [np.array(sorted(indices), np.int64) for indices in chosen]


@torch.no_grad()
def _read(
    model: nn.Module,
    tcs: TranscoderSet,
    data: TokenData,
    collectors: Sequence["_Collector | None"],
    split: str,
    batch_size: int,
    tokens: int | None,
    progress: bool,
) -> int:
    """Streams the corpus through the collectors; returns the number of tokens looked at."""
    from tqdm.auto import tqdm

    seen = 0
    with (
        activation_source(model, tcs.sites) as source,
        tqdm(total=tokens, desc="features", unit="tok", disable=not progress) as bar,
    ):
        for batch in data.batches(split, batch_size, max_tokens=tokens):
            block = _Block(batch, source.places(batch))
            for transcoder, x, collector in zip(tcs, source.read(batch)[0], collectors, strict=True):
                if collector is not None:
                    collector.add(block, *transcoder.encode(x.to(transcoder.W_enc)).active())
            seen += len(block.places)
            bar.update(batch.n_tokens)
    return seen


class _Block:
    """A block of tokens, flattened: ids, the piece of a document that each belongs to, the places looked at."""

    def __init__(self, batch: TokenBatch, places: Tensor) -> None:
        self.ids = batch.input_ids.flatten().numpy()
        self.pieces = np.cumsum(batch.position_ids.flatten().numpy() == 0)
        self.places = places.numpy()


class _Collector:
    """What is kept for the wanted features of one layer, each in a slot of its own."""

    def __init__(
        self,
        wanted: Array,
        n_features: int,
        kept: tuple[int, int],
        window: tuple[int, int],
        rng: np.random.Generator,
    ) -> None:
        n = len(wanted)
        self._wanted, self._n, self._rng = wanted, n, rng
        self._slots = np.full(n_features, -1, np.int64)  # of each feature; -1: not wanted
        self._slots[wanted] = np.arange(n)
        self._offsets = np.arange(-window[0], window[1] + 1)
        fields = ("peak", "ids", "values")
        self._top, self._spread = (Largest(n, size, fields) for size in kept)
        self._sample = Largest(n, 512, ("value",))
        self._active = np.zeros(n, np.int64)
        self._maximum, self._total = np.zeros(n), np.zeros(n)

    def add(self, block: _Block, tokens: Tensor, features: Tensor, values: Tensor) -> None:
        """Takes the active entries of a block, ordered by token, then feature."""
        slots = self._slots[features.cpu().numpy()]
        kept = slots >= 0
        places, slots = block.places[tokens.cpu().numpy()[kept]], slots[kept]
        activations = values.cpu().double().numpy()[kept]
        self._active += np.bincount(slots, minlength=self._n)
        np.maximum.at(self._maximum, slots, activations)
        self._total += np.bincount(slots, activations, minlength=self._n)
        keys = self._rng.random(len(slots))
        passing = self._sample.accepts(slots, keys)
        self._sample.add(slots[passing], keys[passing], value=activations[passing])

        group = block.pieces[places] * self._n + slots  # one example per piece of a document: its peak
        order = np.lexsort((-activations, group))
        peaks = order[np.append(True, np.diff(group[order]) > 0)] if len(order) else order
        entries = places * self._n + slots  # ascending
        for largest, keys in (
            (self._top, activations[peaks]),
            (self._spread, self._rng.random(len(peaks))),
        ):
            passing = largest.accepts(slots[peaks], keys)
            chosen = peaks[passing]
            windows = self._windows(block, places[chosen], slots[chosen], entries, activations)
            largest.add(slots[chosen], keys[passing], peak=activations[chosen], **windows)

    def _windows(
        self, block: _Block, peaks: Array, slots: Array, entries: Array, activations: Array
    ) -> dict[str, Array]:
        """Token ids ``[m, W]`` around each peak, -1 outside its document, and the feature's activations there."""
        at = peaks[:, None] + self._offsets
        inside = np.clip(at, 0, len(block.ids) - 1)
        same = (at == inside) & (block.pieces[inside] == block.pieces[peaks][:, None])
        wanted = inside * self._n + slots[:, None]
        found = np.minimum(np.searchsorted(entries, wanted), max(len(entries) - 1, 0))
        values = np.where(entries[found] == wanted, activations[found], 0.0) if len(entries) else 0.0 * wanted
        return {
            "ids": np.where(same, block.ids[inside], -1).astype(np.int32),
            "values": np.where(same, values, 0.0).astype(np.float32),
        }

    def result(
        self,
        layer: int,
        seen: int,
        norms: Sequence[float],
        lists: Sequence[list[list[tuple[int, float]]]],
    ) -> list[FeatureEvidence]:
        top, spread = (_by_slot(largest, self._n) for largest in (self._top, self._spread))
        sample = self._sample.entries()
        return [
            FeatureEvidence(
                layer,
                int(index),
                seen,
                int(self._active[slot]),
                float(self._maximum[slot]),
                float(self._total[slot]) / seen,
                norms[slot],
                self._examples(top[slot]),
                _intervals(self._examples(spread[slot])),
                sorted(sample["value"][sample["slot"] == slot].tolist()) if sample else [],
                *(column[slot] for column in lists),
            )
            for slot, index in enumerate(self._wanted)
        ]

    def _examples(self, entries: dict[str, Array]) -> list[Example]:
        """Examples by falling peak, without the places outside their documents."""
        found = []
        for row in np.argsort(-entries["peak"], kind="stable"):
            inside = entries["ids"][row] >= 0
            peak = int(inside[: -int(self._offsets[0])].sum())
            ids, values = (entries[name][row][inside].tolist() for name in ("ids", "values"))
            found.append(Example(ids, values, peak))
        return found


def _by_slot(largest: Largest, slots: int) -> list[dict[str, Array]]:
    entries = largest.entries()
    if not entries:
        return [{"peak": np.empty(0)} for _ in range(slots)]
    bounds = np.searchsorted(entries["slot"], np.arange(slots + 1))
    return [
        {name: column[bounds[slot] : bounds[slot + 1]] for name, column in entries.items()}
        for slot in range(slots)
    ]


def _intervals(examples: list[Example]) -> list[list[Example]]:
    return [[examples[i] for i in part] for part in np.array_split(np.arange(len(examples)), INTERVALS)]


@torch.no_grad()
def _token_lists(
    model: nn.Module, tcs: TranscoderSet, number: int, chosen: Array, n: int
) -> list[list[list[tuple[int, float]]]]:
    """Tokens promoted, suppressed and read by every chosen feature."""
    transcoder, site = tcs[number], tcs.sites[number]
    rows = torch.from_numpy(chosen).to(transcoder.W_enc.device)
    inputs = embedding_inputs(model, site)
    lists: list[list[list[tuple[int, float]]]] = [[], [], []]
    for part in rows.split(256):  # [256, V] at a time
        effects = logit_directions(model, site, transcoder.W_dec[part])
        read = transcoder.W_enc[part].to(inputs) @ inputs.T
        for found, scores in zip(lists, (effects, -effects, read), strict=True):
            best = scores.topk(min(n, scores.shape[1]), dim=-1)
            found += [
                list(zip(ids, values, strict=True))
                for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
    lists[1] = [[(token, -value) for token, value in row] for row in lists[1]]
    return lists
