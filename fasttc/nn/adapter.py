"""TranscoderAdapter: what fine-tuning added to one MLP, as a few sparse features beside the base's MLP."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from fasttc.nn import io
from fasttc.nn.site import Site
from fasttc.nn.transcoder import Transcoder, TranscoderConfig
from fasttc.nn.transcoder_set import TranscoderSet
from fasttc.ops import SparseActs

Feature = tuple[int, int]
"""(layer of the model, feature of that layer's adapter)."""


class TranscoderAdapter(Transcoder):
    """``T(x) = relu(x W_enc^T + b_enc) W_dec + b_dec``, such that ``MLP_base(x) + T(x)`` is about ``MLP_target(x)``.

    Hu et al. 2026, arXiv 2602.20904. A ReLU transcoder in all but where it stands and how it starts: encoder rows
    uniform in ``(-1/sqrt(D), 1/sqrt(D))``, everything else zero, so that an adapter that has learned nothing adds
    nothing.

    Args:
        d_in: D, width of the MLP's input.
        n_features: F.
        d_out: width of the MLP's output; D when None.
        dtype, device: of the parameters.

    Attributes:
        factors: None, or [F]: what each activation is multiplied by. 0 ablates a feature, a number above 1 amplifies
            it, a negative one turns it round. A property of this object, not of the weights: it is not saved, and
            :meth:`AdapterSet.with_factors` makes objects that share all weights and differ in it.
    """

    factors: Tensor | None

    def __init__(
        self,
        d_in: int,
        n_features: int,
        d_out: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(d_in, n_features, d_out, "relu", dtype=dtype, device=device)
        self.register_buffer("factors", None, persistent=False)

    @classmethod
    def from_config(
        cls, config: TranscoderConfig, *, dtype: torch.dtype | None = None
    ) -> "TranscoderAdapter":
        """A new one of these sizes.

        Raises:
            ValueError: any other activation than ReLU, or a skip connection.
        """
        if config.activation != "relu" or config.skip:
            raise ValueError(f"adapter: expected activation 'relu' without a skip connection, got {config}")
        return cls(config.d_in, config.n_features, config.d_out, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws a new encoder from the global generator; biases and decoder zero."""
        if self.W_enc.is_meta:
            return
        bound = self.d_in**-0.5
        self.W_enc.uniform_(-bound, bound)
        for parameter in (self.b_enc, self.W_dec, self.b_dec):
            parameter.zero_()

    def encode(self, x: Tensor, *, impl: str = "auto") -> SparseActs:
        """Active features of ``x [..., D]`` times ``factors``. See :func:`fasttc.ops.encode`.

        A feature whose factor is 0 keeps its entry, with value 0, and so counts as inactive.
        """
        acts = super().encode(x, impl=impl)
        if self.factors is None:
            return acts
        return replace(acts, values=acts.values * self.factors.to(acts.values.dtype)[acts.indices.long()])


class AdapterSet(TranscoderSet):
    """Adapters of some or all layers of a model; :class:`TranscoderSet` says how they are kept and saved.

    Every site reads "mlp_in" (norm gain included) and writes "mlp_out": what an adapter computes is added to the
    output of the MLP module itself, before any post-norm. On Gemma, public transcoders write after that norm, so
    adapters and transcoders must not be added up there.

    Raises:
        TypeError: a member that is no :class:`TranscoderAdapter`.
        ValueError: a site elsewhere, and whatever :class:`TranscoderSet` raises.
    """

    kind: ClassVar[io.Kind] = "adapters"
    member: ClassVar[type[Transcoder]] = TranscoderAdapter

    def __init__(
        self,
        adapters: Sequence[TranscoderAdapter],
        sites: Sequence[Site],
        metadata: dict[str, Any] | None = None,
    ) -> None:
        for adapter in adapters:
            if not isinstance(adapter, TranscoderAdapter):
                raise TypeError(f"adapters: expected TranscoderAdapter, got {type(adapter).__name__}")
        super().__init__(adapters, sites, metadata)

    def _check_and_set(self, sites: list[Site], metadata: dict[str, Any] | None) -> None:
        for site in sites:
            if (site.x, site.y) != ("mlp_in", "mlp_out"):
                raise ValueError(
                    f"sites: expected adapters to read mlp_in and write mlp_out, layer {site.layer} reads {site.x} "
                    f"and writes {site.y}"
                )
        super()._check_and_set(sites, metadata)

    def __getitem__(self, index: int) -> TranscoderAdapter:
        return cast(TranscoderAdapter, super().__getitem__(index))

    def __iter__(self) -> Iterator[TranscoderAdapter]:
        return (self[index] for index in range(len(self)))

    def with_factors(self, factors: Mapping[Feature, float], *, others: float = 1.0) -> Self:
        """The same adapters, sharing all weights, with activations multiplied by factors.

        Args:
            factors: factor by (layer, feature); on top of those that are there already.
            others: factor of all other features; 0 leaves only the named ones on.

        Raises:
            ValueError: a layer or feature that this set does not have; a factor that is not finite.
        """
        by_layer: dict[int, dict[int, float]] = {layer: {} for layer in self.layers}
        for (layer, feature), factor in factors.items():
            if layer not in by_layer or not 0 <= feature < self[self.layers.index(layer)].n_features:
                raise ValueError(f"features: expected (layer, feature) of {self!r}, got ({layer}, {feature})")
            by_layer[layer][feature] = _finite(factor)
        return self._changed(
            [
                _scaled_view(adapter, by_layer[site.layer], others)
                for adapter, site in zip(self, self.sites, strict=True)
            ]
        )

    def ablated(self, features: Iterable[Feature]) -> Self:
        """The same adapters without these features."""
        return self.with_factors(dict.fromkeys(features, 0.0))

    def only(self, features: Iterable[Feature]) -> Self:
        """The same adapters without all other features; decoder biases stay."""
        return self.with_factors(dict.fromkeys(features, 1.0), others=0.0)

    def scaled(self, factor: float) -> Self:
        """New adapters with decoders and their biases times ``factor``.

        Beside the fine-tuned model itself, a negative factor takes back what the adapters say it has learned.

        Raises:
            ValueError: a factor that is not finite.
        """
        factor = _finite(factor)
        scaled = [copy.deepcopy(adapter) for adapter in self]
        with torch.no_grad():
            for adapter in scaled:
                adapter.W_dec.mul_(factor)
                adapter.b_dec.mul_(factor)
        return self._changed(scaled)

    def _changed(self, adapters: Sequence[TranscoderAdapter]) -> Self:
        return type(self)(adapters, self.sites, self.metadata)


def _finite(factor: float) -> float:
    if not math.isfinite(factor):
        raise ValueError(f"factor: expected a finite number, got {factor}")
    return factor


def _scaled_view(
    adapter: TranscoderAdapter, factors: Mapping[int, float], others: float
) -> TranscoderAdapter:
    """An adapter with the parameters of another and factors of its own."""
    own = torch.full((adapter.n_features,), others, dtype=adapter.b_enc.dtype, device=adapter.b_enc.device)
    for feature, factor in factors.items():
        own[feature] = factor
    view = copy.copy(adapter)
    view._buffers = {**adapter._buffers, "factors": own if adapter.factors is None else adapter.factors * own}
    return view
