"""What an intervention is: which features, at which positions, and what becomes of their activations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fasttc.nn import TranscoderSet

Action = Literal["set", "scale", "add"]
Positions = int | slice | Sequence[int] | None
_NEIGHBOURS = 8  # a control feature comes from so many of the nearest firing rates


@dataclass(frozen=True)
class Intervention:
    """Changes the activations of some features of one layer. ``Intervention(layer, features)`` ablates them.

    Attributes:
        layer: number of the layer.
        features: an index, several, or None for every active feature of the layer.
        positions: of tokens in the sequence. An int or several: negative ones count from the end of the prompt, those
            after it are tokens generated later. A slice (without step): an open end reaches all generated tokens.
            None: everywhere but at the leading positions that the transcoder's site zeroes.
        action: "set" to ``value``, "scale" by it, "add" it. Features that are not active can be set and added to.
        value: 0 with "set" ablates; "scale" by -1 flips; "scale" by ``1 - c`` is what adding a copy of the features
            with negated decoders does at strength c (see :func:`negated`).

    Raises:
        ValueError, TypeError: a negative layer or index, no feature, an unknown action, a value that is not finite.
    """

    layer: int
    features: int | Sequence[int] | None
    positions: Positions = None
    action: Action = "set"
    value: float = 0.0

    def __post_init__(self) -> None:
        _check_int("Intervention.layer", self.layer)
        if self.features is not None:
            object.__setattr__(self, "features", _listed("Intervention.features", self.features, lowest=0))
        if self.action not in get_args(Action):
            raise ValueError(
                f"Intervention.action: expected one of {', '.join(get_args(Action))}, got {self.action!r}"
            )
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise TypeError(f"Intervention.value: expected a number, got {type(self.value).__name__}")
        if not abs(self.value) < float("inf"):
            raise ValueError(f"Intervention.value: expected a finite number, got {self.value}")
        if isinstance(self.positions, slice):
            if self.positions.step not in (None, 1):
                raise ValueError(
                    f"Intervention.positions: expected a slice without step, got {self.positions}"
                )
        elif self.positions is not None:
            object.__setattr__(
                self, "positions", _listed("Intervention.positions", self.positions, lowest=None)
            )

    @property
    def indices(self) -> tuple[int, ...] | None:
        """The features as a tuple; None for all."""
        assert self.features is None or isinstance(self.features, tuple), "made a tuple by the constructor"
        return self.features

    def reached(self, start: int, length: int, prompt: int, zeroed: int) -> Tensor:
        """``[length]`` bool: which of the tokens at positions ``start``, ... it changes.

        Args:
            start: position of the first token.
            length: how many tokens.
            prompt: length of the prompt, which negative positions count from.
            zeroed: leading positions that "everywhere" leaves out.
        """
        at = torch.arange(start, start + length)
        if self.positions is None:
            return at >= zeroed
        if isinstance(self.positions, slice):
            first, stop = (
                None if end is None else end + prompt if end < 0 else end
                for end in (self.positions.start, self.positions.stop)
            )
            reached = at >= (first or 0)
            return reached if stop is None else reached & (at < stop)
        assert isinstance(self.positions, tuple), "made a tuple by the constructor"
        wanted = torch.tensor([number + prompt if number < 0 else number for number in self.positions])
        return torch.isin(at, wanted)

    def applied(self, activations: Tensor) -> Tensor:
        """New activations from old ones, any shape."""
        if self.action == "set":
            return torch.full_like(activations, self.value)
        return activations * self.value if self.action == "scale" else activations + self.value

    def check(self, tcs: TranscoderSet) -> None:
        """ValueError where ``tcs`` does not have the layer or the features."""
        if self.layer not in tcs.layers:
            raise ValueError(
                f"Intervention.layer: expected a layer of the transcoders {tcs.layers}, got {self.layer}"
            )
        limit = tcs[tcs.layers.index(self.layer)].n_features
        if self.indices is None and self.action != "scale" and not (self.action == "set" and self.value == 0):
            raise ValueError(
                f"Intervention: expected named features for {self.action} {self.value}, got all of layer {self.layer}"
            )
        beyond = [index for index in self.indices or () if index >= limit]
        if beyond:
            raise ValueError(f"Intervention.features: expected indices in [0, {limit}), got {beyond[0]}")

    def check_positions(self, length: int, prompt: int) -> None:
        """ValueError where a position is not in a sequence of ``length`` tokens that begins with the prompt."""
        for position in self.positions if isinstance(self.positions, tuple) else ():
            if not -prompt <= position < length:
                raise ValueError(
                    f"Intervention.positions: expected numbers in [-{prompt}, {length}), got {position}"
                )


def negated(tcs: TranscoderSet, strength: float = 0.5) -> list[Intervention]:
    """Steering by negated decoders: at every token, ``-strength`` times what all features write is added.

    Args:
        tcs: whose features; with those of an adapter, a fine-tuned model is steered towards its base.
        strength: 0 changes nothing, 1 takes away all that the features write.
    """
    return [Intervention(layer, None, action="scale", value=1 - strength) for layer in tcs.layers]


def random_control(
    interventions: Sequence[Intervention],
    tcs: TranscoderSet,
    *,
    seed: int = 0,
    rates: Sequence[Tensor] | None = None,
) -> list[Intervention]:
    """The same interventions on as many random features of the same layers: what a set has to be compared with.

    Args:
        interventions: on named features.
        tcs: the transcoders.
        seed: of the choice; the same seed chooses the same features.
        rates: firing rates, per transcoder ``[F]`` (``evaluate(...).features[i].firing_rate``). Given, each feature is
            replaced by one of those that fire about as often (of the eight nearest); otherwise by any.

    Raises:
        ValueError: interventions on all features, rates that do not fit, a layer with too few other features.
    """
    generator = torch.Generator().manual_seed(seed)
    if rates is not None and [len(rate) for rate in rates] != [transcoder.n_features for transcoder in tcs]:
        raise ValueError("rates: expected one tensor [F] per transcoder")
    free: dict[int, Tensor] = {}
    for intervention in interventions:
        intervention.check(tcs)
        if intervention.indices is None:
            raise ValueError(f"control: expected named features, got all of layer {intervention.layer}")
        number = tcs.layers.index(intervention.layer)
        open_ = free.setdefault(intervention.layer, torch.ones(tcs[number].n_features, dtype=torch.bool))
        open_[list(intervention.indices)] = False
    controls = []
    for intervention in interventions:
        open_, number = free[intervention.layer], tcs.layers.index(intervention.layer)
        chosen = []
        for index in intervention.indices or ():
            candidates = open_.nonzero()[:, 0]
            if not len(candidates):
                raise ValueError(
                    f"control: expected as many other features in layer {intervention.layer} "
                    f"({tcs[number].n_features} in all) as are changed"
                )
            if rates is not None:
                distance = (rates[number].cpu()[candidates] - rates[number].cpu()[index]).abs()
                candidates = candidates[distance.argsort(stable=True)[:_NEIGHBOURS]]
            drawn = int(candidates[int(torch.randint(len(candidates), (1,), generator=generator))])
            open_[drawn] = False
            chosen.append(drawn)
        controls.append(replace(intervention, features=tuple(chosen)))
    return controls


def _check_int(name: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name}: expected an int, got {type(number).__name__}")
    if number < 0:
        raise ValueError(f"{name}: expected an int >= 0, got {number}")


def _listed(name: str, numbers: int | Sequence[int], *, lowest: int | None) -> tuple[int, ...]:
    listed = (numbers,) if isinstance(numbers, int) else tuple(numbers)
    if not listed:
        raise ValueError(f"{name}: expected at least one, got none")
    for number in listed:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name}: expected ints, got {type(number).__name__}")
        if lowest is not None and number < lowest:
            raise ValueError(f"{name}: expected numbers >= {lowest}, got {number}")
    return listed
