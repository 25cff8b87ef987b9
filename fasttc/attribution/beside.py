"""Adapters beside MLPs in an attribution graph: alone, with the MLP as a linear path, or joined with transcoders."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fasttc.attribution.linearize import LinearLayer, LinearModel, linearize
from fasttc.attribution.sources import LayerSources, Sources, check_finite, encoded, find_sources
from fasttc.models import anatomy
from fasttc.models.linear import FrozenModel, FrozenNorm
from fasttc.models.relp import LinearMlp, linear_mlp
from fasttc.nn import AdapterSet, TranscoderSet


@dataclass(frozen=True)
class MlpPath:
    """A dense MLP between residuals, linear by the rules of RelP, norms folded in: stands where a skip does.

    Attributes:
        mlp: the map of its input.
        read: norm before it.
        write: norm after it, or None.
    """

    mlp: LinearMlp
    read: FrozenNorm
    write: FrozenNorm | None

    @property
    def hidden(self) -> int:
        """Width of the MLP."""
        return self.mlp.down.shape[1]

    def vjp(self, gradient: Tensor) -> Tensor:
        """What comes back to the residual from ``gradient [P, n, D]``, same shape."""
        if self.write is not None:
            gradient = gradient * self.write.scale[: len(gradient), None, None] * self.write.gain
        back = self.mlp.pull_back(gradient) * self.read.gain
        if self.read.centred:
            back = back - back.mean(-1, keepdim=True)
        return back * self.read.scale[: len(gradient), None, None]

    def jvp(self, resid: Tensor, first: int = 0) -> Tensor:
        """What is added to the residual ``[T - first, n, D]`` of positions ``first`` on, same shape."""
        at = slice(first, first + len(resid))
        if self.read.centred:
            resid = resid - resid.mean(-1, keepdim=True)
        out = self.mlp.apply(resid * self.read.scale[at, None, None] * self.read.gain, first)
        if self.write is None:
            return out
        return out * self.write.scale[at, None, None] * self.write.gain


def beside_mlps(frozen: FrozenModel, adapters: AdapterSet, base: nn.Module) -> tuple[Sources, LinearModel]:
    """Adapter features as the only sources beside tokens; MLPs of ``base`` are paths. There are no errors.

    Args:
        frozen: the hybrid of the target and ``base`` on a prompt, read at the adapters' sites.
        adapters: one per layer.
        base: whose MLPs run beside them.
    """
    sources, linear = find_sources(frozen, adapters), linearize(frozen, adapters)
    layers, parts = [], anatomy(base).layers
    for number, layer in enumerate(linear.layers):
        mlp = linear_mlp(base.get_submodule(parts[number].mlp), frozen.x[number], frozen.embedding.dtype)
        path = MlpPath(mlp, frozen.layers[number].mlp_norm, frozen.layers[number].mlp_post_norm)
        layers.append(replace(layer, skip=path))
    silent = tuple(replace(layer, errors=torch.zeros_like(layer.errors)) for layer in sources.layers)
    return replace(sources, layers=silent), replace(linear, layers=tuple(layers))


@dataclass(frozen=True)
class _Joined(LayerSources):
    """Features of a transcoder and of an adapter; ``W_enc`` and ``W_dec`` hold the rows of active ones only.

    Attributes:
        encoders: per owner, the index of its first feature, all its encoder rows, and a gain that they still lack.
    """

    encoders: tuple[tuple[int, Tensor, Tensor | None], ...] = ()

    @property
    def n_features(self) -> int:
        first, weights, _ = self.encoders[-1]
        return first + len(weights)

    def encoder_row(self, index: int) -> Tensor:
        first, weights, gain = next(part for part in reversed(self.encoders) if index >= part[0])
        row = weights[index - first]
        return row if gain is None else row.to(gain.dtype) * gain


def joined(frozen: FrozenModel, tcs: TranscoderSet, adapters: AdapterSet) -> tuple[Sources, LinearModel]:
    """Features of both in one graph, errors are what they leave over together: ``y - T_base(x) - N(T_adapter(x'))``.

    Adapters write before Gemma's post-norm, most transcoders after it. Nothing is added up across it: what an adapter
    feature writes passes the norm at its frozen scale and gain. Adapter features are numbered after the layer's own
    ones: index ``F_base + i``.

    Args:
        frozen: of the model on a prompt, read at the sites of ``tcs`` and then at those of ``adapters``.
        tcs: one transcoder per layer; none reads "resid_mid".
        adapters: of all or some layers.
    """
    n = len(tcs)
    own = replace(frozen, x=frozen.x[:n], y=frozen.y[:n])
    sources, linear = find_sources(own, tcs), linearize(own, tcs)
    layers = list(sources.layers)
    for number, (adapter, site) in enumerate(zip(adapters, adapters.sites, strict=True)):
        layer = site.layer
        layers[layer] = _join(
            layers[layer],
            linear.layers[layer],
            frozen.layers[layer].mlp_post_norm if tcs.sites[layer].y == "mlp_out_post" else None,
            frozen.layers[layer].mlp_norm.gain if tcs.sites[layer].x == "normalized" else None,
            adapter,
            frozen.x[n + number],
        )
    feature_ptr = [0]
    for layer in layers:
        feature_ptr.append(feature_ptr[-1] + len(layer.features))
    return replace(sources, layers=tuple(layers), feature_ptr=tuple(feature_ptr)), linear


def _join(
    base: LayerSources,
    linear: LinearLayer,
    post: FrozenNorm | None,
    gain: Tensor | None,
    adapter: Any,
    x: Tensor,
) -> LayerSources:
    """One layer: ``post`` is passed by what the adapter writes alone, ``gain`` by what it reads alone."""
    acts, written = encoded(adapter, x)
    position, feature, value = acts.active()
    value, written = value.to(base.errors.dtype), written.to(base.errors.dtype)
    if post is not None:
        written = written * post.scale[:, None] * post.gain
    errors = base.errors - written
    errors[: base.zeroed] = 0
    check_finite(errors, "reconstruction errors with adapters")
    kept = position >= base.zeroed
    position, feature, value = position[kept], feature[kept], value[kept]
    rows = [_active(base.features), _active(feature)]
    W_enc = [base.W_enc[rows[0][0]], adapter.W_enc.detach()[rows[1][0]]]
    W_dec = [base.W_dec[rows[0][0]], adapter.W_dec.detach()[rows[1][0]]]
    if gain is not None:
        W_enc[1] = W_enc[1] * gain
    if post is not None:
        W_dec[1] = W_dec[1] * post.gain
    first = base.n_features
    columns = (
        torch.cat([base.positions, position]),
        torch.cat([base.features, feature + first]),
        torch.cat([rows[0][1], rows[1][1] + len(rows[0][0])]),
        torch.cat([base.activations, value]),
        torch.cat([base.weights, value if post is None else value * post.scale[position]]),
    )
    order = (columns[0] * (first + adapter.n_features) + columns[1]).argsort()
    positions, features, table, activations, weights = (column[order] for column in columns)
    like = base.errors.dtype
    return _Joined(
        features=features,
        positions=positions,
        activations=activations,
        before=tuple(torch.searchsorted(positions, torch.arange(len(x) + 1, device=x.device)).tolist()),
        errors=errors,
        zeroed=base.zeroed,
        W_enc=torch.cat([part.to(like) for part in W_enc]),
        W_dec=torch.cat([part.to(like) for part in W_dec]),
        rows=table,
        weights=weights,
        encoders=((0, base.W_enc, None), (first, adapter.W_enc.detach(), gain)),
    )


def _active(features: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct features, ascending, and the place of each feature among them."""
    return features.unique(return_inverse=True)
