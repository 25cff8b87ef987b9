"""What transcoders see: inputs and outputs of every MLP for a block of tokens, straight from the running model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fasttc.models.anatomy import anatomy
from fasttc.models.capture import capture
from fasttc.nn import Site
from fasttc.training.packing import TokenBatch


class ActivationSource:
    """Runs a model without its language-model head and reads (x, y) at every site. Nothing is written to disk.

    Made by :func:`activation_source`, which puts the hooks in place and takes them off.
    """

    def __init__(self, trunk: nn.Module, record, device: torch.device) -> None:
        self._trunk = trunk
        self._record = record
        self._device = device

    @property
    def sites(self) -> list[Site]:
        return self._record.sites

    def places(self, batch: TokenBatch) -> Tensor:
        """Where the tokens that :meth:`read` gives stand in the flattened block, ``[N]`` int64, ascending."""
        skipped = max(site.zero_positions for site in self.sites)
        return (batch.mask & (batch.position_ids >= skipped)).flatten().nonzero()[:, 0]

    @torch.no_grad()
    def read(self, batch: TokenBatch) -> tuple[list[Tensor], list[Tensor]]:
        """Lists of x [N, D] and y [N, D_out], float32 (float64 in a float64 model), one per site.

        The N tokens are those of ``batch.mask`` (neither padding nor first of their document), in order. Positions
        the sites zero beyond the first are left out too.
        """
        kept = self.places(batch)
        self._trunk(**batch.to(self._device).model_inputs)
        xs, ys = ([_rows(t, kept) for t in part] for part in (self._record.x, self._record.y))
        self._record.clear()
        return xs, ys


@contextmanager
def activation_source(model: nn.Module, sites: Sequence[Site]) -> Iterator[ActivationSource]:
    """Yields an :class:`ActivationSource`; the model is in evaluation mode meanwhile and as before afterwards."""
    trunk = model.get_submodule(anatomy(model).trunk)
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    try:
        with capture(model, sites) as record:
            yield ActivationSource(trunk, record, device)
    finally:
        for module, mode in training.items():
            module.training = mode


def _rows(t: Tensor, kept: Tensor) -> Tensor:
    rows = t.reshape(-1, t.shape[-1]).index_select(0, kept.to(t.device))
    return rows if rows.dtype == torch.float64 else rows.float()
