"""Where edges come from: active features, reconstruction errors and token embeddings of one prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttc.models.linear import FrozenModel
from fasttc.nn import Transcoder, TranscoderSet
from fasttc.ops import SparseActs


@dataclass(frozen=True)
class LayerSources:
    """Active features and errors of one layer.

    Attributes:
        features: ``[n]`` int64 feature indices, ordered by position, then index.
        positions: ``[n]`` int64, ascending.
        activations: ``[n]`` in the compute dtype.
        before: T + 1 numbers: how many of the features sit at positions below 0, 1, ..., T.
        errors: ``[T, D]``: MLP output minus reconstruction, zero at the zeroed positions.
        zeroed: how many leading positions are zeroed.
        W_enc, W_dec: of the transcoder, in place.
        rows: ``[n]`` int64: where in ``W_enc`` and ``W_dec`` each feature has its rows; by default at its index.
        weights: ``[n]``: what its decoder row is multiplied by; by default its activation.
    """

    features: Tensor
    positions: Tensor
    activations: Tensor
    before: tuple[int, ...]
    errors: Tensor
    zeroed: int
    W_enc: Tensor
    W_dec: Tensor
    rows: Tensor
    weights: Tensor

    @property
    def n_features(self) -> int:
        """F, active or not."""
        return self.W_enc.shape[0]

    def encoder_row(self, index: int) -> Tensor:
        """``[D]`` of any feature, active or not."""
        return self.W_enc[index]

    def decoder_rows(self, start: int, stop: int) -> Tensor:
        """``[stop - start, D]``: what the features ``start`` to ``stop`` write: decoder rows times weights."""
        rows = self.W_dec[self.rows[start:stop]].to(self.weights.dtype)
        return rows.mul_(self.weights[start:stop, None])


@dataclass(frozen=True)
class Sources:
    """All sources of one prompt, and the numbering of the graph's columns.

    Columns: features (layer, position, index), errors (layer, position), tokens (position), as in ``Graph``.

    Attributes:
        layers: L of them.
        embedding: ``[T, D]``.
        feature_ptr: L + 1 numbers: column of each layer's first feature.
    """

    layers: tuple[LayerSources, ...]
    embedding: Tensor
    feature_ptr: tuple[int, ...]

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_tokens(self) -> int:
        return self.embedding.shape[0]

    @property
    def n_features(self) -> int:
        return self.feature_ptr[-1]

    def features(self) -> Tensor:
        """``[n_features, 3]`` int64: layer, position, index, in column order."""
        rows = [
            torch.stack([torch.full_like(layer.features, number), layer.positions, layer.features], dim=1)
            for number, layer in enumerate(self.layers)
        ]
        return torch.cat(rows)

    def activations(self) -> Tensor:
        """``[n_features]`` in column order."""
        return torch.cat([layer.activations for layer in self.layers])

    def width(self, depth: int, length: int) -> int:
        """How many sources lie in layers below ``depth`` at positions below ``length``, tokens included."""
        return sum(layer.before[length] + length for layer in self.layers[:depth]) + length


def find_sources(frozen: FrozenModel, tcs: TranscoderSet) -> Sources:
    """Encodes every layer's input and takes what is active; errors are what the decoders leave over.

    Raises:
        ValueError: NaN or infinite MLP inputs, outputs or activations, naming the layer.
    """
    layers, feature_ptr = [], [0]
    for number, (transcoder, site) in enumerate(zip(tcs, tcs.sites, strict=True)):
        x, y = frozen.x[number], frozen.y[number]
        check_finite(x, f"MLP input of layer {number}")
        check_finite(y, f"MLP output of layer {number}")
        acts, reconstruction = encoded(transcoder, x)
        errors = y - reconstruction.to(y.dtype)
        position, feature, value = acts.active()
        check_finite(value, f"feature activations of layer {number}")
        errors[: site.zero_positions] = 0
        check_finite(errors, f"reconstruction errors of layer {number}")
        kept = position >= site.zero_positions
        position, feature, value = position[kept], feature[kept], value[kept].to(y.dtype)
        before = torch.searchsorted(position, torch.arange(len(x) + 1, device=position.device))
        layers.append(
            LayerSources(
                features=feature,
                positions=position,
                activations=value,
                before=tuple(before.tolist()),
                errors=errors,
                zeroed=min(site.zero_positions, len(x)),
                W_enc=transcoder.W_enc.detach(),
                W_dec=transcoder.W_dec.detach(),
                rows=feature,
                weights=value,
            )
        )
        feature_ptr.append(feature_ptr[-1] + len(feature))
    return Sources(tuple(layers), frozen.embedding, tuple(feature_ptr))


@torch.no_grad()
def encoded(transcoder: Transcoder, x: Tensor) -> tuple[SparseActs, Tensor]:
    """Activations and reconstruction in evaluation mode (BatchTopK then has a threshold of its own)."""
    training = transcoder.training
    transcoder.eval()
    try:
        acts = transcoder.encode(x)
        return acts, transcoder.decode(acts, x)
    finally:
        transcoder.train(training)


def check_finite(tensor: Tensor, name: str) -> None:
    """ValueError with the name where a number is NaN or infinite."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
