"""What a graph explains: next-token logits, chosen tokens, logit differences, directions, features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttc.attribution.linearize import LinearModel
from fasttc.attribution.plan import Point
from fasttc.attribution.positions import Positions
from fasttc.attribution.prompt import token_names
from fasttc.attribution.sources import Sources
from fasttc.attribution.trace import Targets
from fasttc.models.linear import Unembedding


@dataclass(frozen=True)
class Logit:
    """The logit of a token, minus the mean logit, before a final soft-cap. Weight: its probability.

    Attributes:
        token: id, or text that the tokenizer turns into one token.
        position: where it is predicted from; -1 is the last one.
        weight: in the influence; the probability when None.
    """

    token: int | str
    position: int = -1
    weight: float | None = None


@dataclass(frozen=True)
class LogitDifference:
    """The logit of ``token`` minus that of ``other``, before a final soft-cap."""

    token: int | str
    other: int | str
    position: int = -1
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Direction:
    """The component of a residual along ``vector [D]``.

    Attributes:
        vector: the direction; not normalised.
        layer: read after this layer; None reads the output of the last norm, where the unembedding does.
        position: -1 is the last one.
        weight: in the influence.
        label: name of the node.
    """

    vector: Tensor
    layer: int | None = None
    position: int = -1
    weight: float = 1.0
    label: str = "direction"


@dataclass(frozen=True)
class Feature:
    """The pre-activation of a feature, active or not."""

    layer: int
    position: int
    index: int
    weight: float = 1.0


Target = int | str | Logit | LogitDifference | Direction | Feature


@dataclass(frozen=True)
class Root:
    """A target, resolved.

    Attributes:
        point, position: where its gradient enters the residual.
        vector: ``[D]`` gradient with respect to that residual.
        id: token id; a number beyond the vocabulary for targets of another kind.
        weight: in the influence.
        label: name of the node.
    """

    point: Point
    position: int
    vector: Tensor
    id: int
    weight: float
    label: str


class Resolver:
    """Turns targets into roots of the sweep.

    Args:
        model: linear maps of the prompt.
        sources: its sources.
        final: ``[T, D]`` output of the last norm.
        unembedding: of the model.
        tokenizer: for targets given as text and for labels, or None.
    """

    def __init__(
        self, model: LinearModel, sources: Sources, final: Tensor, unembedding: Unembedding, tokenizer: Any
    ) -> None:
        self.model, self.sources, self.final = model, sources, final
        self.unembedding, self.tokenizer = unembedding, tokenizer
        self._probs: dict[int, Tensor] = {}

    def roots(
        self, targets: Sequence[Target] | Tensor | None, max_logits: int, logit_prob: float
    ) -> list[Root]:
        """Roots of the given targets in their order, or of the most probable next tokens.

        Raises:
            ValueError, TypeError: a target that does not exist, naming what does.
        """
        if targets is None:
            return self._most_probable(max_logits, logit_prob)
        listed: Any = targets
        given: list[Any] = listed.tolist() if isinstance(listed, Tensor) else list(listed)
        if not given:
            raise ValueError("targets: expected at least one, got none")
        return [self._root(target, number) for number, target in enumerate(given)]

    def _most_probable(self, max_logits: int, logit_prob: float) -> list[Root]:
        if isinstance(max_logits, bool) or not isinstance(max_logits, int) or max_logits < 1:
            raise ValueError(f"max_logits: expected a positive int, got {max_logits!r}")
        if not 0 < logit_prob <= 1:
            raise ValueError(f"logit_prob: expected a number in (0, 1], got {logit_prob!r}")
        probs, ids = self._probabilities(self.sources.n_tokens - 1).topk(min(max_logits, self._vocabulary))
        count = min(len(probs), int((probs.cumsum(0) < logit_prob).sum()) + 1)
        return [self._root(Logit(token), number) for number, token in enumerate(ids[:count].tolist())]

    @property
    def _vocabulary(self) -> int:
        return self.unembedding.weight.shape[0]

    def _probabilities(self, position: int) -> Tensor:
        if position not in self._probs:
            self._probs[position] = torch.softmax(self.unembedding.logits(self.final[position]), dim=-1)
        return self._probs[position]

    def _root(self, target: Any, number: int) -> Root:
        if isinstance(target, int | str) and not isinstance(target, bool):
            target = Logit(target)
        if isinstance(target, Logit):
            token, position = self._token(target.token), self._position(target.position)
            weight = float(self._probabilities(position)[token]) if target.weight is None else target.weight
            rows = self.unembedding
            direction = rows.weight[token].to(rows.mean.dtype) - rows.mean
            return self._at_end(direction, position, token, weight, self._name(token))
        if isinstance(target, LogitDifference):
            token, other = self._token(target.token), self._token(target.other)
            rows = self.unembedding.weight
            direction = rows[token].to(self.final.dtype) - rows[other].to(self.final.dtype)
            label = f"{self._name(token).strip()} - {self._name(other).strip()}"
            position = self._position(target.position)
            return self._at_end(direction, position, self._vocabulary + number, target.weight, label)
        if isinstance(target, Direction):
            return self._direction(target, number)
        if isinstance(target, Feature):
            return self._feature(target, number)
        raise TypeError(
            "targets: expected token ids, texts, Logit, LogitDifference, Direction or Feature, "
            f"got {type(target).__name__}"
        )

    def _at_end(self, vector: Tensor, position: int, id: int, weight: float, label: str) -> Root:
        """A root at the output of the last norm."""
        here = torch.tensor([position], device=self.final.device)
        vector = self.model.final_vjp(vector.to(self.final.dtype)[None], here)[0]
        return Root(Point(self.sources.n_layers, False), position, vector, id, weight, label)

    def _direction(self, target: Direction, number: int) -> Root:
        position, id = self._position(target.position), self._vocabulary + number
        vector = torch.as_tensor(target.vector).detach().to(self.final)
        if tuple(vector.shape) != tuple(self.final.shape[1:]) or not bool(torch.isfinite(vector).all()):
            raise ValueError(
                f"Direction.vector: expected {self.final.shape[1]} finite numbers, got shape {list(vector.shape)}"
            )
        if target.layer is None:
            return self._at_end(vector, position, id, target.weight, target.label)
        layer = _below("Direction.layer", target.layer, self.sources.n_layers)
        return Root(Point(layer + 1, False), position, vector, id, target.weight, target.label)

    def _feature(self, target: Feature, number: int) -> Root:
        number_of_layer = _below("Feature.layer", target.layer, self.sources.n_layers)
        layer, linear = self.sources.layers[number_of_layer], self.model.layers[number_of_layer]
        index = _below("Feature.index", target.index, layer.n_features)
        position = self._position(target.position)
        here = torch.tensor([position], device=self.final.device)
        vector = linear.read_vjp(layer.encoder_row(index).to(self.final.dtype)[None], here)[0]
        point = Point(number_of_layer, attention_first=not linear.parallel)
        label = f"feature {number_of_layer}/{position}/{index}"
        return Root(point, position, vector, self._vocabulary + number, target.weight, label)

    def _position(self, position: int) -> int:
        length = self.sources.n_tokens
        if isinstance(position, bool) or not isinstance(position, int) or not -length <= position < length:
            raise ValueError(
                f"target position: expected an int in [-{length}, {length}) for {length} tokens, got {position!r}"
            )
        return position % length

    def _token(self, token: int | str) -> int:
        if isinstance(token, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"target {token!r}: expected a token id, or a tokenizer to find it, got neither"
                )
            ids = self.tokenizer.encode(token, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(f"target {token!r}: expected a single token, got {len(ids)} ({ids})")
            token = ids[0]
        return _below("target token", token, self._vocabulary)

    def _name(self, token: int) -> str:
        return token_names(torch.tensor([token]), self.tokenizer)[0]


def _below(name: str, number: Any, limit: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < limit:
        raise ValueError(f"{name}: expected an int in [0, {limit}), got {number!r}")
    return number


def root_targets(roots: Sequence[Root], first_row: int) -> list[Targets]:
    """Roots as targets of the sweep, grouped by the point where they enter; rows number them in their order."""
    groups = []
    for point in sorted(
        {root.point for root in roots}, key=lambda point: (point.depth, point.attention_first)
    ):
        members = sorted((root.position, number) for number, root in enumerate(roots) if root.point == point)
        vectors = torch.stack([roots[number].vector for _, number in members])
        rows = [first_row + number for _, number in members]
        positions = [position for position, _ in members]
        groups.append(
            Targets(
                point=point,
                rows=torch.tensor(rows, device=vectors.device),
                positions=Positions(positions, torch.tensor(positions, device=vectors.device)),
                vectors=lambda start, stop, vectors=vectors: vectors[start:stop],
            )
        )
    return groups
