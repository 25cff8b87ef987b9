"""Random transcoders and documents, small enough to check every number by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fasttc.models import default_sites
from fasttc.nn import Site, Transcoder, TranscoderSet


@pytest.fixture
def documents() -> list[list[int]]:
    """Token ids of nine documents of 3 to 21 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = [3 + (7 * i) % 19 for i in range(9)]
    return [torch.randint(4, 61, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def transcoders() -> Callable[..., TranscoderSet]:
    """`transcoders(model, activation="topk", **site_changes)`: random skip transcoders, F = 24, k = 5, float64."""

    def make(model: nn.Module, activation: str = "topk", **site_changes) -> TranscoderSet:
        generator = torch.Generator().manual_seed(1)
        width = model.config.hidden_size
        tcs = []
        for _ in default_sites(model):
            tc = Transcoder(width, 24, width, activation, 5, skip=True, dtype=torch.float64)
            with torch.no_grad():
                for parameter in tc.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(0.3 * noise)
            tcs.append(tc)
        sites = [Site(**{**site.to_dict(), **site_changes}) for site in default_sites(model)]
        return TranscoderSet(tcs, sites)

    return make
