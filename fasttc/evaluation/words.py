"""What adapter features do to the words a model writes: choosing features, matched controls, rates under ablation."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fasttc.models import hybrid
from fasttc.nn import AdapterSet, TranscoderAdapter
from fasttc.nn.adapter import Feature
from fasttc.training.bridging import Comparison, comparison
from fasttc.training.packing import NO_LABEL, TokenBatch

Writer = Callable[[nn.Module], Sequence[str]]
"""Lets a model write texts; the same draws for every model that it is given."""


class WordClass:
    """Words that are counted together, whole and without regard to case.

    Raises:
        ValueError: no words.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if not words or not all(words):
            raise ValueError(f"words: expected at least one, none of them empty, got {list(words)}")
        self.words = tuple(words)
        self._pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)

    def rate(self, texts: Iterable[str]) -> float:
        """Occurrences per thousand words; 0 where there are no words."""
        hits = total = 0
        for text in texts:
            hits += len(self._pattern.findall(text))
            total += len(re.findall(r"\w+", text))
        return 1000 * hits / total if total else 0.0

    def labels(self, batch: TokenBatch, tokenizer: Any) -> Tensor:
        """[B, T] bool: whether the next token is part of a word, as tokenised at the start or after a space."""
        found = torch.zeros_like(batch.labels, dtype=torch.bool)
        for word in self.words:
            for form in sorted({space + w for w in (word, word.capitalize()) for space in ("", " ")}):
                ids = tokenizer(form, add_special_tokens=False)["input_ids"]
                windows = batch.labels.unfold(1, len(ids), 1) if len(ids) <= batch.labels.shape[1] else None
                if windows is not None and ids:
                    hits = (windows == torch.tensor(ids, device=windows.device)).all(-1)
                    for offset in range(len(ids)):
                        found[:, offset : offset + hits.shape[1]] |= hits
        return found & (batch.labels != NO_LABEL)


@dataclass(frozen=True)
class FeatureTable:
    """Adapter features of all layers on the same tokens; one entry per feature that was ever active.

    Attributes:
        features: (layer, feature).
        rate: [n] share of tokens on which it is active.
        strength: [n] mean over all tokens of activation times norm of the decoder row.
        effect: [n] first-order effect of its presence on ``mean log p`` of a word class's tokens minus that of all
            other tokens, nats.
    """

    features: list[Feature]
    rate: NDArray[np.float64]
    strength: NDArray[np.float64]
    effect: NDArray[np.float64]

    def strongest(self, n: int) -> list[Feature]:
        """The n features that raise the word class most."""
        return [self.features[i] for i in np.argsort(-self.effect, kind="stable")[:n]]


def feature_table(
    target: nn.Module,
    base: nn.Module,
    adapters: AdapterSet,
    batches: Iterable[TokenBatch],
    words: WordClass,
    tokenizer: Any,
) -> FeatureTable:
    """How often every adapter feature is active, how much it writes, and what it does for a word class.

    One forward and one backward per block: with ``g_t`` the gradient of the class's contrast with respect to what the
    adapter adds at token t, the effect of feature i is ``sum_t f_ti (W_dec_i . g_t)``.

    Raises:
        ValueError: blocks in which none of the words occurs.
    """
    with comparison(target, base) as models:
        sums = _Sums(models, adapters, words, tokenizer)
        for batch in batches:
            sums.add(batch)
    if not sums.hits:
        raise ValueError(f"words: expected some of {', '.join(words.words)} in the text, found none")
    return sums.table()


class _Sums:
    """Per layer: counts, writings and effects of all features; float64 on the adapters' device."""

    def __init__(self, models: Comparison, adapters: AdapterSet, words: WordClass, tokenizer: Any) -> None:
        self._models, self._adapters = models, adapters
        self._words, self._tokenizer = words, tokenizer
        self.hits = self._others = self._tokens = 0
        self._sums = [
            {
                name: a.b_enc.new_zeros(a.n_features, dtype=torch.float64)
                for name in ("on", "sum", "hit", "other")
            }
            for a in adapters
        ]
        self._outputs: list[tuple[Any, Tensor] | None] = [None] * len(adapters)

    def add(self, batch: TokenBatch) -> None:
        reference = self._models.reference(batch)
        contributions = {
            layer: partial(self._contribution, i, adapter)
            for i, (layer, adapter) in enumerate(zip(self._adapters.layers, self._adapters, strict=True))
        }
        final = self._models.final(reference, contributions)
        inside = self._words.labels(reference.batch, self._tokenizer).flatten()[reference.predicting]
        kept = torch.zeros(reference.batch.mask.numel(), dtype=torch.float64)
        kept[reference.kept.cpu()] = 1
        for name, chosen in (("hit", inside), ("other", ~inside)):
            loss = self._models.divergence.cross_entropy(final[chosen], reference.labels[chosen])
            outputs = [pair[1] for pair in self._outputs if pair is not None]
            gradients = torch.autograd.grad(-loss, outputs, retain_graph=True)
            for i, gradient in enumerate(gradients):
                self._effect(i, name, gradient.flatten(0, 1))
        for i in range(len(self._adapters)):
            self._activity(i, kept)
        self.hits += int(inside.sum())
        self._others += int((~inside).sum())
        self._tokens += len(reference.kept)
        self._outputs = [None] * len(self._adapters)

    def _contribution(self, i: int, adapter: TranscoderAdapter, x: Tensor) -> Tensor:
        with torch.no_grad():
            acts = adapter.encode(x.to(adapter.W_enc))
            output = adapter.decode(acts)
        leaf = output.detach().requires_grad_()
        self._outputs[i] = acts, leaf
        return leaf.to(x)

    @torch.no_grad()
    def _effect(self, i: int, name: str, gradient: Tensor) -> None:
        pair = self._outputs[i]
        assert pair is not None, "every adapter ran in this forward"
        token, feature, value = pair[0].active()
        along = (self._adapters[i].W_dec[feature] * gradient[token]).sum(-1)
        self._sums[i][name].index_add_(0, feature, (value * along).double())

    @torch.no_grad()
    def _activity(self, i: int, kept: Tensor) -> None:
        pair = self._outputs[i]
        assert pair is not None, "every adapter ran in this forward"
        token, feature, value = pair[0].active()
        here = kept.to(token.device)[token]
        norms = self._adapters[i].W_dec.norm(dim=1)[feature]
        self._sums[i]["on"].index_add_(0, feature, here)
        self._sums[i]["sum"].index_add_(0, feature, here * (value * norms).double())

    def table(self) -> FeatureTable:
        features: list[Feature] = []
        columns: list[list[float]] = [[], [], []]
        for layer, sums in zip(self._adapters.layers, self._sums, strict=True):
            effect = sums["hit"] / max(self.hits, 1) - sums["other"] / max(self._others, 1)
            alive = sums["on"].nonzero()[:, 0].tolist()
            features += [(layer, feature) for feature in alive]
            for column, values in zip(columns, (sums["on"], sums["sum"], effect), strict=True):
                column += values[alive].tolist()
        rate, strength, effect = (np.array(column, np.float64) for column in columns)
        return FeatureTable(features, rate / self._tokens, strength / self._tokens, effect)


def matched_controls(
    table: FeatureTable, chosen: Sequence[Feature], draws: int = 20, *, neighbours: int = 10, seed: int = 0
) -> list[list[Feature]]:
    """Random feature sets of the size of ``chosen`` and alike in firing rate and strength; none of them is chosen.

    Each chosen feature is replaced, without repetition in a draw, by one of its ``neighbours`` nearest in the
    standardised logarithms of rate and strength.

    Raises:
        ValueError: a chosen feature that the table lacks, or fewer other features than chosen ones.
    """
    place = {feature: i for i, feature in enumerate(table.features)}
    if missing := [feature for feature in chosen if feature not in place]:
        raise ValueError(f"chosen: expected features that are active on this text, got {missing}")
    others = np.array([i for feature, i in place.items() if feature not in set(chosen)])
    if len(others) < len(chosen):
        raise ValueError(
            f"controls: expected at least {len(chosen)} other active features, got {len(others)}"
        )
    points = np.log(np.stack([table.rate, table.strength], 1) + 1e-12)
    points = (points - points.mean(0)) / (points.std(0) + 1e-12)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        taken: set[int] = set()
        for i in rng.permutation([place[feature] for feature in chosen]).tolist():
            near = others[np.argsort(((points[others] - points[i]) ** 2).sum(1), kind="stable")]
            free = [j for j in near.tolist() if j not in taken][:neighbours]
            taken.add(int(rng.choice(free)))
        found.append(sorted(table.features[j] for j in taken))
    return found


@dataclass(frozen=True)
class WordEffect:
    """Rates of a word class per thousand words.

    Attributes:
        target, hybrid, adapted: the fine-tuned model; the hybrid without and with all adapter features.
        ablated: without the chosen features.
        controls: without each of the matched random sets.
    """

    target: float
    hybrid: float
    adapted: float
    ablated: float
    controls: list[float]

    @property
    def change(self) -> float:
        """``|ablated - adapted|``."""
        return abs(self.ablated - self.adapted)

    @property
    def control_changes(self) -> list[float]:
        return [abs(rate - self.adapted) for rate in self.controls]

    @property
    def percentile_95(self) -> float:
        """Of the controls' changes; 20 draws are interpolated linearly."""
        return float(np.quantile(self.control_changes, 0.95))

    @property
    def counts(self) -> bool:
        """Whether the change lies beyond that percentile."""
        return self.change > self.percentile_95


@torch.no_grad()
def ablation_effect(
    target: nn.Module,
    base: nn.Module,
    adapters: AdapterSet,
    words: WordClass,
    chosen: Sequence[Feature],
    controls: Sequence[Sequence[Feature]],
    write: Writer,
) -> WordEffect:
    """Lets every variant write, and counts.

    Args:
        target, base, adapters: see :func:`fasttc.models.hybrid`.
        words: what is counted.
        chosen: features whose ablation is in question.
        controls: see :func:`matched_controls`.
        write: called once per variant with the target, overridden as it may be.
    """

    def rate(features: Sequence[Feature] | None) -> float:
        with hybrid(target, base, adapters if features is None else adapters.ablated(features)):
            return words.rate(write(target))

    own = words.rate(write(target))
    with hybrid(target, base):
        without = words.rate(write(target))
    return WordEffect(own, without, rate(None), rate(chosen), [rate(features) for features in controls])
