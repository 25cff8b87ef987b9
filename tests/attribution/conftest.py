"""The oracle of attribution: the Hugging Face model itself, frozen, and autograd through it.

Independent of fasttc.models.linear and fasttc.attribution: norms and attention of the live modules are replaced by
their values on one prompt, MLPs by constants (plus a skip connection), and the rest is whatever transformers does.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttc import Site, Transcoder, TranscoderSet
from fasttc.models import anatomy, bind_sites, capture, default_sites


class FrozenOracle:
    """A model frozen on one prompt; runs with other residuals and MLP outputs.

    Attributes:
        x, y: per layer, ``[T, D]``: MLP input and output at the sites, on the prompt.
        entry: ``[T, D]`` residual before the first layer.
        tokens: ``[T, D]`` the part of it that is the token embedding.
    """

    def __init__(self, model: nn.Module, tcs: TranscoderSet, ids: Tensor) -> None:
        self.model, self.tcs, self.ids = model, tcs, ids
        self.parts = anatomy(model)
        self.trunk = model.get_submodule(self.parts.trunk)
        self.patterns: dict[nn.Module, Tensor] = {}
        self.scales: dict[nn.Module, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            for layer in self.parts.layers:
                attention = model.get_submodule(layer.attn)
                stack.callback(attention.register_forward_hook(self._record_pattern).remove)
            for norm in self._norms():
                stack.callback(norm.register_forward_pre_hook(self._record_scale).remove)
            seen = stack.enter_context(capture(model, tcs.sites))
            entries = stack.enter_context(self._entries())
            self.trunk(input_ids=ids[None])
        self.x, self.y = [x[0] for x in seen.x], [y[0] for y in seen.y]
        self.entry = entries[0]
        positions = torch.arange(len(ids))
        learned = self.parts.position_embed
        self.tokens = self.entry - (model.get_submodule(learned)(positions) if learned else 0)
        self.acts = [transcoder.encode(x).detach() for transcoder, x in zip(tcs, self.x, strict=True)]

    def _norms(self) -> list[nn.Module]:
        paths = [self.parts.final_norm]
        for layer in self.parts.layers:
            paths += [layer.attn_norm, layer.mlp_norm, layer.attn_post_norm or "", layer.mlp_post_norm or ""]
        return [self.model.get_submodule(path) for path in paths if path]

    def _record_pattern(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.patterns[module] = output[1]

    def _record_scale(self, module: Any, args: Any) -> None:
        x = args[0]
        if isinstance(module, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        self.scales[module] = (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    @contextmanager
    def _entries(self, replacement: Tensor | None = None) -> Iterator[list[Tensor]]:
        """Collects, and optionally replaces, the input of the first layer."""
        seen = []

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            value = args[0] if args else kwargs["hidden_states"]
            seen.append(value[0].detach())
            if replacement is None:
                return None
            if args:
                return (replacement[None], *args[1:]), kwargs
            return args, kwargs | {"hidden_states": replacement[None]}

        handle = self.model.get_submodule(self.parts.layers[0].block).register_forward_pre_hook(
            hook, with_kwargs=True
        )
        yield seen
        handle.remove()

    def _frozen_norm(self, module: Any, x: Tensor) -> Tensor:
        if isinstance(module, nn.LayerNorm):
            return (x - x.mean(-1, keepdim=True)) * self.scales[module] * module.weight + module.bias
        gain = 1 + module.weight if "Gemma" in type(module).__name__ else module.weight
        return x * self.scales[module] * gain

    def _frozen_attention(self, module: nn.Module, _query: Any, _key: Any, value: Tensor, *_: Any, **__: Any):
        pattern = self.patterns[module]
        value = value.repeat_interleave(pattern.shape[1] // value.shape[1], dim=1)
        return (pattern @ value).transpose(1, 2).contiguous(), pattern

    def run(
        self, entry: Tensor | None = None, written: list[Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Per layer x ``[T, D]``, and the output of the last norm ``[T, D]``; differentiable.

        Args:
            entry: residual before the first layer; that of the prompt by default.
            written: per layer, what the MLP writes beside its skip connection; by default that of the prompt.
        """
        written = self.constants() if written is None else written
        with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
            modeling = sys.modules[type(self.model.get_submodule(self.parts.layers[0].attn)).__module__]
            patch.setattr(modeling, "eager_attention_forward", self._frozen_attention)
            for norm in self._norms():
                patch.setattr(norm, "forward", lambda x, norm=norm: self._frozen_norm(norm, x))
            stack.enter_context(self._entries(self.entry if entry is None else entry))
            x: list[Tensor] = []
            for site, transcoder, value in zip(
                bind_sites(self.model, self.tcs.sites), self.tcs, written, strict=True
            ):
                norm, writer = self.model.get_submodule(site.read), self.model.get_submodule(site.write)
                stack.callback(norm.register_forward_hook(self._reader(site.x, x)).remove)
                stack.callback(writer.register_forward_hook(self._writer(transcoder.W_skip, value, x)).remove)
            final = []
            norm = self.model.get_submodule(self.parts.final_norm)
            stack.callback(norm.register_forward_hook(lambda *args: final.append(args[-1][0])).remove)
            self.trunk(input_ids=self.ids[None])
            return x, final[0]

    def _reader(self, kind: str, x: list[Tensor]) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            resid = args[0]
            if kind == "normalized" and isinstance(module, nn.LayerNorm):
                resid = resid - resid.mean(-1, keepdim=True)
            read = {"mlp_in": output, "normalized": resid * self.scales[module], "resid_mid": resid}[kind]
            x.append(read[0])

        return hook

    def _writer(self, skip: Tensor | None, value: Tensor, x: list[Tensor]) -> Any:
        def hook(*_: Any) -> Tensor:
            return (value if skip is None else value + x[-1] @ skip.T)[None]

        return hook

    def constants(self) -> list[Tensor]:
        """Per layer, y without its skip part."""
        return [
            y.clone() if transcoder.W_skip is None else y - x @ transcoder.W_skip.T
            for transcoder, x, y in zip(self.tcs, self.x, self.y, strict=True)
        ]

    def biases(self) -> list[Tensor]:
        """Per layer, the part of ``constants`` that is no node: decoder bias, and everything where zeroed."""
        parts = []
        for transcoder, site, value in zip(self.tcs, self.tcs.sites, self.constants(), strict=True):
            bias = transcoder.b_dec.expand_as(value).clone()
            bias[: site.zero_positions] = value[: site.zero_positions]
            parts.append(bias)
        return parts

    def adjacency(self, graph: Any, unembedding: Tensor) -> Tensor:
        """Dense ``[nodes, nodes]`` of a graph's nodes, one backward pass per target."""
        entry = self.entry.clone().requires_grad_()
        written = [value.clone().requires_grad_() for value in self.constants()]
        x, final = self.run(entry, written)
        targets = [
            x[layer][position] @ self.tcs[layer].W_enc[index] for layer, position, index in graph.features
        ]
        directions = unembedding[graph.logit_ids] - unembedding.mean(0)
        targets += [final[-1] @ direction for direction in directions]
        stacked = torch.stack(targets)
        grads = torch.autograd.grad(
            stacked,
            [entry, *written],
            torch.eye(len(targets)).to(entry),
            allow_unused=True,
            is_grads_batched=True,
        )
        empty = torch.zeros(len(targets), *entry.shape, dtype=entry.dtype)
        at_entry, *at_written = [empty if grad is None else grad for grad in grads]
        layer, position, index = graph.features.T
        vectors = [self.tcs[a].W_dec[b] for a, b in zip(layer.tolist(), index.tolist(), strict=True)]
        features = (torch.stack(at_written, 1)[:, layer, position] * torch.stack(vectors)).sum(-1)
        errors = [(grad * error).sum(-1) for grad, error in zip(at_written, self.errors(), strict=True)]
        tokens = (at_entry * self.tokens).sum(-1)
        edges = torch.cat([features * graph.activations, *errors, tokens], dim=1)
        dense = torch.zeros(graph.n_nodes, graph.n_nodes, dtype=entry.dtype)
        rows = [*range(graph.n_features), *range(graph.logit_slice.start, graph.n_nodes)]
        dense[rows, : edges.shape[1]] = edges
        return dense.detach()

    def errors(self) -> list[Tensor]:
        """Per layer ``[T, D]``: what the transcoder misses, zero where zeroed."""
        found = []
        for number, (transcoder, site) in enumerate(zip(self.tcs, self.tcs.sites, strict=True)):
            error = self.y[number] - transcoder.decode(self.acts[number], self.x[number])
            error[: site.zero_positions] = 0
            found.append(error.detach())
        return found


@pytest.fixture
def oracle() -> Callable[..., FrozenOracle]:
    """`oracle(model, tcs, ids)`: the model frozen on a prompt, differentiable, without fasttc's own algebra."""
    return FrozenOracle


@pytest.fixture
def random_set() -> Callable[..., TranscoderSet]:
    """`random_set(model, activation="topk", *, skip, x, y, n_features, zero_positions)`: effects of order one."""

    def make(
        model: nn.Module,
        activation: str = "topk",
        *,
        skip: bool = False,
        x: str | None = None,
        y: str | None = None,
        n_features: int = 40,
        zero_positions: int = 1,
    ) -> TranscoderSet:
        parts = anatomy(model)
        dtype = next(model.parameters()).dtype
        transcoders, sites = [], []
        for site in default_sites(model):
            transcoder = Transcoder(
                parts.d_model, n_features, activation=activation, k=5, skip=skip, dtype=dtype
            )
            with torch.no_grad():
                transcoder.W_enc.normal_(std=parts.d_model**-0.5)
                transcoder.W_dec.normal_(std=0.5 * parts.d_model**-0.5)
                transcoder.b_enc.normal_(std=0.1)
                transcoder.b_dec.normal_(std=0.1)
                if transcoder.threshold is not None:
                    transcoder.threshold.fill_(0.9)
                if transcoder.W_skip is not None:
                    transcoder.W_skip.normal_(std=0.4 * parts.d_model**-0.5)
            transcoders.append(transcoder.eval())
            sites.append(Site(site.layer, x or site.x, y or site.y, zero_positions=zero_positions))
        return TranscoderSet(transcoders, sites)

    return make


@pytest.fixture
def prompt_ids() -> Tensor:
    return torch.tensor([2, 17, 9, 33, 5, 51, 28, 9, 40])
