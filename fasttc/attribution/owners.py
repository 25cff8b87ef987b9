"""Whose features a graph has: of transcoders, of adapters beside MLPs, or of both."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttc.attribution.beside import beside_mlps, joined
from fasttc.attribution.linearize import LinearModel, linearize
from fasttc.attribution.sources import Sources, find_sources
from fasttc.models import check_match, evaluating, hybrid
from fasttc.models.linear import FrozenModel, LayerWeights, freeze
from fasttc.nn import AdapterSet, TranscoderSet


@dataclass(frozen=True)
class Owners:
    """Transcoders, adapters and the base whose MLPs run beside adapters; each may be None, but not all.

    Raises (:meth:`check`):
        ValueError: neither of the first two, adapters alone without a base, a base without adapters, sets that do not
            fit the model, transcoders that read the residual beside adapters that read its norm.
        TypeError: adapters given as transcoders, or the other way round.
    """

    tcs: TranscoderSet | None
    adapters: AdapterSet | None = None
    base: nn.Module | None = None

    def check(self, model: nn.Module) -> None:
        """Whether all of this fits ``model`` and one another."""
        if isinstance(self.tcs, AdapterSet):
            raise TypeError("tcs: expected a TranscoderSet, got an AdapterSet; pass it as adapters=")
        if self.adapters is not None and not isinstance(self.adapters, AdapterSet):
            raise TypeError(f"adapters: expected an AdapterSet, got {type(self.adapters).__name__}")
        if self.tcs is not None:
            check_match(model, self.tcs)
        if self.adapters is None:
            if self.base is not None:
                raise ValueError("base: expected adapters with it, got a base alone")
            if self.tcs is None:
                raise ValueError("tcs: expected transcoders, adapters or both, got neither")
            return
        check_match(model, self.adapters, None if self.tcs is None else self.adapters.layers)
        if self.tcs is None and self.base is None:
            raise ValueError(
                "base: expected the model whose MLPs run beside adapters without transcoders, got None"
            )
        for site in self.tcs.sites if self.tcs is not None else ():
            if site.x == "resid_mid" and site.layer in self.adapters.layers:
                raise ValueError(
                    f"tcs: expected transcoders that read mlp_in or normalized beside adapters, "
                    f"got resid_mid at layer {site.layer}"
                )

    def read(
        self, model: nn.Module, ids: Tensor, dtype: torch.dtype, weights: tuple[LayerWeights, ...]
    ) -> tuple[FrozenModel, Sources, LinearModel]:
        """Runs the model once on a prompt (with a base: its hybrid) and finds what its graph is made of."""
        sites = [site for one in (self.tcs, self.adapters) if one is not None for site in one.sites]
        with ExitStack() as stack:
            if self.base is not None:
                stack.enter_context(evaluating(self.base))
                stack.enter_context(hybrid(model, self.base, self.adapters))
            frozen = freeze(model, ids, sites, dtype=dtype, weights=weights)
        if self.adapters is None:
            assert self.tcs is not None, "checked before"
            return frozen, find_sources(frozen, self.tcs), linearize(frozen, self.tcs)
        if self.tcs is None:
            assert self.base is not None, "checked before"
            return frozen, *beside_mlps(frozen, self.adapters, self.base)
        return frozen, *joined(frozen, self.tcs, self.adapters)

    def metadata(self) -> dict[str, Any]:
        """What a graph records of them; the keys of adapters only where there are some."""
        found: dict[str, Any] = {"transcoders": {} if self.tcs is None else self.tcs.metadata}
        if self.adapters is not None:
            widths = [0] * len(self.adapters) if self.tcs is None else [tc.n_features for tc in self.tcs]
            found |= {
                "adapters": self.adapters.metadata,
                "adapters_from": widths,  # per layer, the index of the first adapter feature
                "mlp": "relp" if self.tcs is None else "transcoders",
            }
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoders."""
        one = self.adapters if self.tcs is None else self.tcs
        assert one is not None, "checked before"
        return one[0].W_dec.dtype
