"""circuit-tracer's algorithm (0.4.1, TransformerLens back end), written anew from a description of it: the competitor.

One batch-1 forward finds features and errors. Then the prompt is expanded to ``batch`` copies that pass the model
under autograd, with attention patterns and norm scales detached and MLPs kept as constants. Rows of the graph come
``batch`` at a time: gradients are injected where targets read, one backward pass from the highest layer among them
carries them down over all positions, and at every layer the gradients of all active features' positions are gathered
as ``[batch, active, D]`` and multiplied with the active decoder rows. Rows go into a dense matrix over all nodes.

Gemma-2 with sites ``normalized`` to ``mlp_out_post`` only. Where the time goes is recorded, so that its shares can be
held against those measured in circuit-tracer itself.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fasttc import TranscoderSet
from fasttc.models import anatomy

from .clock import now

MAX_LOGITS, LOGIT_PROB = 10, 0.95


@dataclass
class Dense:
    """A graph as circuit-tracer holds it: ``adjacency [nodes, nodes]``, rows = targets.

    Attributes:
        features: ``[n, 3]`` layer, position, index.
        logit_probs: ``[K]``.
        n_tokens: T.
    """

    adjacency: Tensor
    features: Tensor
    logit_probs: Tensor
    n_tokens: int


@dataclass
class _Layer:
    """One layer of the expanded forward: x ``[B, T, D]`` where features read, active features, errors ``[T, D]``."""

    positions: Tensor
    features: Tensor
    activations: Tensor
    encoders: Tensor
    decoders: Tensor
    errors: Tensor
    first: int = 0


class Replicated:
    """Attribution by autograd over ``batch`` copies of the prompt.

    Attributes:
        seconds: time by part: "forward", "backward", "features" (gather and products), "errors and tokens".
    """

    def __init__(self, model: Any, tcs: TranscoderSet, ids: Tensor, batch: int) -> None:
        self.model, self.tcs, self.ids, self.batch = model, tcs, ids.to(model.device), batch
        self.parts = anatomy(model)
        self.seconds: dict[str, float] = defaultdict(float)
        self._x: list[Tensor] = []
        self._written: list[Tensor] = []
        self._inject: tuple[Tensor, Tensor, Tensor] | None = None
        self._buffer = torch.empty(0)

    def run(self, chosen: Tensor | None = None) -> Dense:
        """The graph, with all active features as targets, or with ``chosen [n, 3]`` in their order (by influence)."""
        with self._frozen():
            with torch.no_grad():
                final, _ = self._forward(1)
                probs, logits = self._targets(final[0, -1])
                layers, tokens = self._components()
            with self._clock("forward"):
                final, embedded = self._forward(self.batch)
            residuals = [*self._x, final]
            self._listen(layers, tokens, embedded, residuals)
            return self._rows(layers, residuals, probs, logits, chosen)

    # The model under autograd

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Norm scales and attention patterns detached, MLP outputs constant."""
        attention = self.model.get_submodule(self.parts.layers[0].attn)
        modeling = sys.modules[type(attention).__module__]
        with ExitStack() as stack:
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            stack.enter_context(mock.patch.object(modeling, "eager_attention_forward", _detached_attention))
            for layer in self.parts.layers:
                for path in (layer.attn_norm, layer.attn_post_norm, layer.mlp_norm, layer.mlp_post_norm):
                    assert path is not None, "Gemma-2 has four norms per layer"
                    kind = {layer.mlp_norm: "read", layer.mlp_post_norm: "write"}.get(path, "")
                    self._replace(stack, path, kind)
            self._replace(stack, self.parts.final_norm, "")
            yield

    def _replace(self, stack: ExitStack, path: str, kind: str) -> None:
        module: Any = self.model.get_submodule(path)

        def forward(x: Tensor) -> Tensor:
            normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.eps).detach()
            if kind == "read":
                self._x.append(normalized)
            out = normalized * (1 + module.weight)
            if kind == "write":
                skip = self._x[-1] * 0
                out = skip + (out - skip).detach()
                self._written.append(out)
            return out

        stack.enter_context(mock.patch.object(module, "forward", forward))

    def _forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Output of the last norm ``[B, T, D]`` and the embeddings it came from."""
        self._x, self._written = [], []
        embed = self.model.get_submodule(self.parts.embed)
        embedded = embed(self.ids.expand(batch, -1)).detach().requires_grad_(torch.is_grad_enabled())
        trunk = self.model.get_submodule(self.parts.trunk)
        return trunk(inputs_embeds=embedded, use_cache=False).last_hidden_state, embedded

    # What is attributed

    def _targets(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and unembedding rows, less their mean, of the likely next tokens."""
        weight: Tensor = self.model.get_submodule(self.parts.lm_head).weight
        logits = weight @ final
        if self.parts.final_softcap is not None:
            logits = self.parts.final_softcap * torch.tanh(logits / self.parts.final_softcap)
        probs, ids = torch.softmax(logits, 0).topk(MAX_LOGITS)
        count = min(MAX_LOGITS, int((probs.cumsum(0) < LOGIT_PROB).sum()) + 1)
        return probs[:count], weight[ids[:count]] - weight.mean(0)

    def _components(self) -> tuple[list[_Layer], Tensor]:
        """Active features, encoder and scaled decoder rows, errors; token embeddings. From the batch-1 forward."""
        layers, first = [], 0
        for transcoder, x, y in zip(self.tcs, self._x, self._written, strict=True):
            dense = transcoder.encode(x[0]).to_dense().to(x.dtype)
            dense[0] = 0
            sparse = dense.to_sparse()
            positions, features = sparse.indices()
            decoders = transcoder.W_dec[features] * sparse.values()[:, None]
            rebuilt = transcoder.b_dec.expand_as(y[0]).clone().index_add_(0, positions, decoders)
            errors = y[0] - rebuilt
            errors[0] = 0
            encoders = transcoder.W_enc[features]
            layers.append(_Layer(positions, features, sparse.values(), encoders, decoders, errors, first))
            first += len(features)
        return layers, self.model.get_submodule(self.parts.embed)(self.ids)

    # One backward pass per batch of targets

    def _listen(
        self, layers: list[_Layer], tokens: Tensor, embedded: Tensor, residuals: list[Tensor]
    ) -> None:
        for number, resid in enumerate(residuals):
            resid.register_hook(lambda grad, number=number: self._injected(grad, number))
        n_features = layers[-1].first + len(layers[-1].features)
        length = len(self.ids)
        for number, (layer, out) in enumerate(zip(layers, self._written, strict=True)):
            place = n_features + number * length
            out.register_hook(lambda grad, layer=layer, place=place: self._score(grad, layer, place))
        place = n_features + len(layers) * length
        embedded.register_hook(lambda grad: self._dots(grad, tokens, place))

    def _injected(self, grad: Tensor, number: int) -> Tensor:
        assert self._inject is not None, "set before each backward pass"
        of_layer, positions, vectors = self._inject
        rows = (of_layer == number).nonzero()[:, 0]
        grad = grad.clone()
        grad.index_put_((rows, positions[rows]), vectors[rows])
        return grad

    def _score(self, grad: Tensor, layer: _Layer, place: int) -> None:
        with self._clock("features"):
            gathered = grad[:, layer.positions]
            self._buffer[layer.first : layer.first + len(layer.features)] += torch.einsum(
                "bpd,pd->pb", gathered, layer.decoders
            )
        self._dots(grad, layer.errors, place)

    def _dots(self, grad: Tensor, vectors: Tensor, place: int) -> None:
        with self._clock("errors and tokens"):
            self._buffer[place : place + len(vectors)] += torch.einsum("bpd,pd->pb", grad, vectors)

    def _rows_of(
        self, residuals: list[Tensor], layers: Tensor, positions: Tensor, vectors: Tensor, width: int
    ) -> Tensor:
        self._buffer = torch.zeros(width, self.batch, device=vectors.device, dtype=vectors.dtype)
        self._inject = (layers, positions, vectors)
        start = residuals[int(layers.max())]
        inside = self.seconds["features"] + self.seconds["errors and tokens"]
        began = now()
        start.backward(gradient=torch.zeros_like(start), retain_graph=True)
        inside = self.seconds["features"] + self.seconds["errors and tokens"] - inside
        self.seconds["backward"] += now() - began - inside
        return self._buffer.T[: len(layers)].cpu()

    def _rows(
        self,
        layers: list[_Layer],
        residuals: list[Tensor],
        probs: Tensor,
        logits: Tensor,
        chosen: Tensor | None,
    ) -> Dense:
        length, count, n_logits = len(self.ids), len(layers), len(probs)
        of_layer = torch.cat([torch.full_like(layer.features, n) for n, layer in enumerate(layers)])
        positions = torch.cat([layer.positions for layer in layers])
        encoders = torch.cat([layer.encoders for layer in layers])
        features = torch.stack([of_layer, positions, torch.cat([layer.features for layer in layers])], 1)
        columns = torch.arange(len(features)) if chosen is None else _places(features.cpu(), chosen)
        others = (count + 1) * length + n_logits
        width = len(features) + others
        edges = torch.zeros(len(columns) + n_logits, width)
        at_end = torch.full_like(of_layer[:n_logits], count)
        edges[:n_logits] = self._rows_of(residuals, at_end, at_end * 0 + length - 1, logits, width)
        for start in range(0, len(columns), self.batch):
            batch = columns[start : start + self.batch]
            rows = self._rows_of(residuals, of_layer[batch], positions[batch], encoders[batch], width)
            edges[n_logits + start : n_logits + start + len(batch)] = rows
        nodes, order = columns.sort()
        adjacency = torch.zeros(len(nodes) + others, len(nodes) + others)
        if chosen is not None:
            kept = torch.cat([nodes, torch.arange(len(features), width)])
            edges = edges[torch.cat([order.new_tensor(range(n_logits)), n_logits + order])][:, kept]
        adjacency[: len(nodes)] = edges[n_logits:]
        adjacency[-n_logits:] = edges[:n_logits]
        return Dense(adjacency, features.cpu()[nodes], probs.cpu(), length)

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        start = now()
        yield
        self.seconds[part] += now() - start


def _places(features: Tensor, chosen: Tensor) -> Tensor:
    """Where each of ``chosen [m, 3]`` stands among ``features [n, 3]``, which are in ascending order."""
    base = int(features.max()) + 1
    scale = torch.tensor([base**2, base, 1])
    return torch.searchsorted((features * scale).sum(1), (chosen * scale).sum(1))


def _detached_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    groups = module.num_key_value_groups
    scores = (query @ key.repeat_interleave(groups, 1).transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = torch.softmax(scores, -1).detach()
    return (pattern @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), pattern
