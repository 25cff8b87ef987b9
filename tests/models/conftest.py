"""Transcoders and prompts for the tiny models."""

from collections.abc import Callable

import pytest
import torch

from fasttc.models import default_sites
from fasttc.nn import Site, Transcoder, TranscoderSet


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[2, 7, 9, 30, 4, 11, 8, 41, 17], [2, 60, 5, 5, 33, 12, 9, 20, 6]])


@pytest.fixture
def transcoders() -> Callable[..., TranscoderSet]:
    """`transcoders(model, sites=None, **options)`: random ones that write about as much as an MLP does."""

    def make(model: torch.nn.Module, sites: list[Site] | None = None, **options) -> TranscoderSet:
        sites = default_sites(model) if sites is None else sites
        dtype = next(model.parameters()).dtype
        made = []
        for site in sites:
            torch.manual_seed(site.layer)
            transcoder = Transcoder(32, 40, **({"k": 6} | options)).to(dtype)
            torch.nn.init.normal_(transcoder.b_dec)
            if transcoder.W_skip is not None:
                torch.nn.init.normal_(transcoder.W_skip, std=0.1)
            made.append(transcoder.eval())
        return TranscoderSet(made, sites)

    return make
