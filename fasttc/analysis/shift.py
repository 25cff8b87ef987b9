"""How far fine-tuning moved what a model holds of documents, class by class and layer by layer.

Tan et al. 2026 (10.1609/aaai.v40i39.40604) look at representations of eight diseases in a plane of principal components
and find small shifts for common ones, large ones for rare ones. Here the shift is a number too: in units of the spread
within classes, beside what the classes share, and beside what random sets of documents would show.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fasttc._files import finite
from fasttc.models import anatomy, check_pair, evaluating, residuals
from fasttc.training.data import open_data
from fasttc.training.documents import Document, read_records, render_fields

Pool = Literal["mean", "last"]


@dataclass(frozen=True)
class ClassShift:
    """One class at one layer. With ``m`` and ``m'`` its mean representation in the base and in the fine-tuned model:

    Attributes:
        name: of the class; documents: of it.
        shift: ``||m' - m|| / spread``.
        plane_shift: the same within the plane of :class:`LayerShift`.
        own: of the shift, what the classes do not share: ``||(m' - m) - mean over classes of (m' - m)|| / spread``.
        own_by_chance: 95th percentile of ``own`` for the class with documents shuffled among the classes.
        cosine: between a document's two representations, mean over documents.
        base, tuned: ``m`` and ``m'`` in the plane.
    """

    name: str
    documents: int
    shift: float
    plane_shift: float
    own: float
    own_by_chance: float
    cosine: float
    base: tuple[float, float]
    tuned: tuple[float, float]


@dataclass(frozen=True)
class LayerShift:
    """All classes at one place of the residual stream.

    Attributes:
        layer: 0 is the embeddings, l what layer l reads, L what the final norm reads.
        spread: root of the mean squared distance of documents from their class's mean, in the base (``n - C`` degrees
            of freedom).
        explained: share of the variance of both models' documents in the plane of the first two principal components.
        silhouette_base, silhouette_tuned: mean silhouette of the classes in each model: 1 far apart, 0 mixed.
        classes: in the order of their names.
    """

    layer: int
    spread: float
    explained: float
    silhouette_base: float
    silhouette_tuned: float
    classes: list[ClassShift]

    @property
    def mean_shift(self) -> float:
        """Over classes, each counted once."""
        return sum(found.shift for found in self.classes) / len(self.classes)


@dataclass(frozen=True)
class ShiftReport:
    """What :func:`representation_shift` found: L + 1 layers, and how it was measured."""

    layers: list[LayerShift]
    pool: Pool
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; None for what is not defined."""
        return finite(asdict(self))


def read_classes(data: Any, *, text: str, label: str) -> tuple[list[str], list[str]]:
    """Documents and their classes from records.

    Args:
        data: see :func:`fasttc.training.documents.read_documents`; records with fields.
        text, label: templates such as ``"{finding}"``.

    Raises:
        ValueError: as for documents; a record whose text or class is empty.
    """
    documents, labels = [], []
    for i, record in enumerate(read_records(data)):
        where = f"record {i}"
        for found, template, what in ((documents, text, "text"), (labels, label, "class")):
            value = render_fields(record, template, where)
            if not value.strip():
                raise ValueError(f"{what}: expected one in {where}, got {value!r}")
            found.append(value)
    return documents, labels


def representation_shift(
    target: nn.Module,
    base: nn.Module,
    documents: Sequence[Document],
    labels: Sequence[str],
    tokenizer: Any = None,
    *,
    pool: Pool = "mean",
    per_class: int = 200,
    context: int = 128,
    batch_size: int = 16,
    draws: int = 100,
    seed: int = 0,
) -> ShiftReport:
    """Measures how far the representations of labelled documents moved from base to target.

    A document's representation at a layer is the residual there, averaged over its tokens without the first, or that of
    its last token; float64 sums. Deterministic. Memory: ``16 D`` bytes for every document and layer.

    Args:
        target: the fine-tuned model; base: the one it came from. Neither is changed.
        documents: text or token ids; of longer ones the first ``context`` tokens count.
        labels: a class for each.
        tokenizer: for text.
        pool: "mean" or "last".
        per_class: documents at most of each class, drawn by ``seed``.
        context: tokens at most of a document, BOS included.
        batch_size: documents in one forward.
        draws: shuffles for :attr:`ClassShift.own_by_chance`; 0: none (NaN).
        seed: of the draws.

    Raises:
        ValueError: models that do not fit one another; fewer than two classes, a class of one document, more labels
            than documents or fewer; a document of fewer than two tokens; options out of range.
    """
    if pool not in get_args(Pool):
        raise ValueError(f"pool: expected one of {', '.join(get_args(Pool))}, got {pool!r}")
    for name, value, least in (
        ("per_class", per_class, 2),
        ("batch_size", batch_size, 1),
        ("draws", draws, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
    check_pair(target, base)
    rng = np.random.default_rng(seed)
    chosen, names, classes = _choose(documents, labels, per_class, rng)
    data = open_data(target, chosen, tokenizer, context=context)
    head = [] if data.bos_id is None else [data.bos_id]
    rows = [[*head, *ids.tolist()][:context] for ids in data.tokens(range(len(chosen)))]
    if short := [row for row in rows if len(row) < 2]:
        raise ValueError(f"documents: expected at least two tokens in each, got {len(short)} with fewer")
    before, after = (_representations(model, rows, pool, batch_size, data.pad_id) for model in (base, target))
    shuffles = [rng.permutation(classes) for _ in range(draws)]
    layers = [
        _layer(layer, before[layer], after[layer], names, classes, shuffles) for layer in range(len(before))
    ]
    settings = {
        "documents": len(rows),
        "context": context,
        "per_class": per_class,
        "draws": draws,
        "seed": seed,
    }
    return ShiftReport(layers, pool, settings)


def _choose(
    documents: Sequence[Document], labels: Sequence[str], per_class: int, rng: np.random.Generator
) -> tuple[list[Document], list[str], np.ndarray]:
    """Documents, names of the classes, and each document's class as its place among the names."""
    if len(documents) != len(labels):
        raise ValueError(f"labels: expected one for each of {len(documents)} documents, got {len(labels)}")
    counts = Counter(labels)
    if len(counts) < 2:
        raise ValueError(f"labels: expected at least two classes, got {', '.join(counts) or 'none'}")
    if lonely := sorted(name for name, count in counts.items() if count < 2):
        raise ValueError(
            f"labels: expected at least two documents of each class, got one of {', '.join(lonely)}"
        )
    names = sorted(counts)
    chosen: list[int] = []
    for name in names:
        own = [i for i, label in enumerate(labels) if label == name]
        chosen += sorted(rng.permutation(own)[:per_class].tolist())
    classes = np.array([names.index(labels[i]) for i in chosen])
    return [documents[i] for i in chosen], names, classes


@torch.no_grad()
def _representations(
    model: nn.Module, rows: Sequence[Sequence[int]], pool: Pool, batch_size: int, pad_id: int
) -> Tensor:
    """[L + 1, n, D] float64 on the CPU. Rows are padded on the right, which no token before it sees."""
    trunk = model.get_submodule(anatomy(model).trunk)
    place = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: list[Tensor] = []
    with evaluating(model), residuals(model) as stream:
        for start in range(0, len(order), batch_size):
            part = [rows[i] for i in order[start : start + batch_size]]
            length = max(map(len, part))
            ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in part], device=place)
            trunk(
                input_ids=ids, position_ids=torch.arange(length, device=place).expand_as(ids), use_cache=False
            )
            weights = torch.zeros(len(part), length, dtype=torch.float64)
            for row, weight in zip(part, weights, strict=True):
                weight[1 if pool == "mean" else len(row) - 1 : len(row)] = 1
            weights /= weights.sum(1, keepdim=True)
            found.append(torch.stack([(weights[:, None] @ h.double().cpu())[:, 0] for h in stream]))
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(found, 1)[:, back]


def _layer(
    layer: int,
    before: Tensor,
    after: Tensor,
    names: list[str],
    classes: np.ndarray,
    shuffles: list[np.ndarray],
) -> LayerShift:
    means = _means(classes, len(names))
    old, new = means @ before, means @ after  # [C, D]
    residual = before - old[torch.from_numpy(classes)]
    spread = math.sqrt(float(residual.square().sum()) / max(len(before) - len(names), 1))
    if spread < 1e-12 * math.sqrt(float(before.square().sum(1).mean())):
        spread = 0.0  # what is left of equal numbers after rounding
    own = _own(new - old) / spread if spread else torch.full((len(names),), math.nan)
    moved = after - before
    chance = torch.stack([_own(_means(shuffled, len(names)) @ moved) for shuffled in shuffles or [classes]])
    limits = chance.quantile(0.95, dim=0) / spread if shuffles and spread else torch.full_like(own, math.nan)
    plane, explained = _plane(torch.cat([before, after]))
    places = (old @ plane, new @ plane)  # [C, 2]
    cosines = means @ torch.nn.functional.cosine_similarity(before, after, dim=1)
    found = [
        ClassShift(
            name,
            int((classes == c).sum()),
            _ratio(float((new - old)[c].norm()), spread),
            _ratio(float((places[1] - places[0])[c].norm()), spread),
            float(own[c]),
            float(limits[c]),
            float(cosines[c]),
            *((float(side[c, 0]), float(side[c, 1])) for side in places),
        )
        for c, name in enumerate(names)
    ]
    return LayerShift(
        layer, spread, explained, _silhouette(before, classes), _silhouette(after, classes), found
    )


def _means(classes: np.ndarray, n: int) -> Tensor:
    """[C, n] float64: times representations [n, D], the mean of each class."""
    member = torch.nn.functional.one_hot(torch.from_numpy(classes), n).T.double()
    return member / member.sum(1, keepdim=True)


def _own(shifts: Tensor) -> Tensor:
    """[C] from shifts [C, D]: length of what the classes do not share."""
    return (shifts - shifts.mean(0)).norm(dim=1)


def _plane(points: Tensor) -> tuple[Tensor, float]:
    """The first two principal directions [D, 2], largest entries positive, and their share of the variance."""
    centred = points - points.mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = directions[:2].T
    plane = plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
    total = float(sizes.square().sum())
    return plane, _ratio(float(sizes[:2].square().sum()), total)


def _silhouette(points: Tensor, classes: np.ndarray) -> float:
    """Mean of ``(b - a) / max(a, b)``; a: mean distance to the rest of the own class, b: to the nearest other."""
    member = torch.nn.functional.one_hot(torch.from_numpy(classes)).double()  # [n, C]
    sums = torch.cdist(points, points) @ member
    counts = member.sum(0)
    own = member.bool()
    a = sums[own] / (counts - 1)[torch.from_numpy(classes)]
    b = (sums / counts).masked_fill(own, math.inf).min(1).values
    larger = torch.maximum(a, b)
    return float(torch.where(larger > 0, (b - a) / larger, 0.0).mean())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
