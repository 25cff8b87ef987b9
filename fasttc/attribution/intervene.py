"""``intervene``: features changed in the running model, and what that does to its answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttc.attribution.effect import Effect
from fasttc.attribution.intervention import Intervention
from fasttc.attribution.prompt import Prompt, token_ids
from fasttc.models import anatomy, capture, check_match, evaluating, held, overridden
from fasttc.models.hold import Held
from fasttc.nn import Site, Transcoder, TranscoderSet
from fasttc.ops import SparseActs


def intervene(
    model: nn.Module,
    tcs: TranscoderSet,
    prompt: Prompt,
    interventions: Intervention | Sequence[Intervention],
    *,
    tokenizer: Any = None,
    freeze_attention: bool = False,
    freeze_norms: bool = False,
    constrained_layers: Sequence[int] | None = None,
    activations: bool = False,
    max_new_tokens: int = 0,
    generation: dict[str, Any] | None = None,
    prepend_bos: bool = True,
) -> Effect:
    """Runs a prompt through the model as it is and with changed features. See :func:`intervened` for what changes.

    Args:
        model: a transformers causal language model of a supported family, also PEFT-wrapped. Not changed.
        tcs: transcoders of all or some of its layers.
        prompt: text, or token ids (a list of int or a tensor ``[T]``).
        interventions: one or several.
        tokenizer: needed for text; names tokens.
        freeze_attention: see :func:`intervened`, as for the next two.
        freeze_norms: see :func:`intervened`.
        constrained_layers: see :func:`intervened`.
        activations: also returns what every transcoder reads from both runs.
        max_new_tokens: also continues the prompt by so many tokens at most, with a key-value cache, in both.
        generation: further arguments of ``model.generate``; greedy without any.
        prepend_bos: puts a beginning-of-sequence token in front of text that has no special token there.

    Returns:
        :class:`Effect`: logits of both runs, and what was asked for. Deterministic, unless ``generation`` samples.

    Raises:
        ValueError, TypeError: as :func:`intervened`; a prompt that is not understood or longer than the context; a
            position that does not exist.
    """
    parts = anatomy(model)
    ids = token_ids(prompt, tokenizer, prepend_bos=prepend_bos)
    if len(ids) + max_new_tokens > parts.max_positions:
        raise ValueError(
            f"prompt: expected at most {parts.max_positions} tokens (the model's context) with those generated, "
            f"got {len(ids)} + {max_new_tokens}"
        )
    changes = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    for change in changes:
        change.check(tcs)
        change.check_positions(len(ids) + max_new_tokens, len(ids))
    embed: Any = model.get_submodule(parts.embed)
    batch = ids[None].to(embed.weight.device)
    options = {"do_sample": False} | (generation or {}) | {"max_new_tokens": max_new_tokens}
    with torch.no_grad(), evaluating(model, *tcs):
        before = _run(model, tcs, batch, activations, options)
        with intervened(
            model,
            tcs,
            changes,
            freeze_attention=freeze_attention,
            freeze_norms=freeze_norms,
            constrained_layers=constrained_layers,
        ):
            after = _run(model, tcs, batch, activations, options)
    return Effect(
        input_ids=ids,
        interventions=changes,
        layers=tcs.layers,
        logits_before=before.logits,
        logits_after=after.logits,
        activations_before=before.activations,
        activations_after=after.activations,
        generated_before=before.generated,
        generated_after=after.generated,
    )


class _Answer(NamedTuple):
    """Logits ``[T, V]`` of a prompt, its activations, and the tokens that follow; None where not asked for."""

    logits: Tensor
    activations: list[SparseActs] | None
    generated: Tensor | None


def _run(model: Any, tcs: TranscoderSet, ids: Tensor, activations: bool, options: dict[str, Any]) -> _Answer:
    with capture(model, tcs.sites if activations else []) as seen:
        logits = model(input_ids=ids, use_cache=False).logits[0]
    acts = [tc.encode(x[0].to(tc.W_enc.device)) for tc, x in zip(tcs, seen.x, strict=False)]
    answer = _Answer(logits, acts if activations else None, None)
    if not options["max_new_tokens"]:
        return answer
    mask = torch.ones_like(ids)  # padding may share the id of a real token
    new = model.generate(input_ids=ids, attention_mask=mask, **options)[0, ids.shape[1] :]
    return answer._replace(generated=new.cpu())


@contextmanager
def intervened(
    model: nn.Module,
    tcs: TranscoderSet,
    interventions: Sequence[Intervention],
    *,
    freeze_attention: bool = False,
    freeze_norms: bool = False,
    constrained_layers: Sequence[int] | None = None,
) -> Iterator[nn.Module]:
    """Inside, features of the true model are changed: ``(new - old activation) times decoder row`` is added to y.

    What the transcoders miss stays as it is, so that without an effect on any activation the model is itself, bit for
    bit. Old activations are those that the transcoder reads from the running model, after the changes further below.
    Interventions on one layer are applied in their order. Works in any forward and in ``generate()`` with a cache.

    Without freezing, everything downstream reacts. Held values are those of the original model on the same tokens
    (see :func:`fasttc.models.held`), generated ones included. With both frozen and all layers constrained, what
    remains is the direct effect: a change of an activation by a share r changes every target by r times its edge.

    Args:
        model: a model of a supported family, in evaluation mode. BatchTopK transcoders should be in it, too.
        tcs: transcoders of all or some of its layers.
        interventions: what to change.
        freeze_attention: attention patterns are the original ones.
        freeze_norms: norm scales are the original ones.
        constrained_layers: there MLP outputs are the original ones plus the changes of this layer (relative to
            original activations), apart from a transcoder's skip connection, which stays linear.

    Raises:
        ValueError: transcoders that do not fit, features that do not exist, a layer that is overridden already.
    """
    parts = anatomy(model)
    check_match(model, tcs, tcs.layers)
    by_layer: dict[int, list[Intervention]] = {}
    for change in interventions:
        change.check(tcs)
        by_layer.setdefault(change.layer, []).append(change)
    constrained = set(constrained_layers or ())
    beyond = sorted(layer for layer in constrained if layer not in range(parts.n_layers))
    if beyond:
        raise ValueError(f"constrained_layers: expected numbers in [0, {parts.n_layers}), got {beyond[0]}")
    placed = dict(zip(tcs.layers, zip(tcs.sites, range(len(tcs)), strict=True), strict=True))
    sites, functions = [], []
    with held(model, attention=freeze_attention, norms=freeze_norms, original=bool(constrained)) as state:
        for layer in sorted(constrained | by_layer.keys()):
            site, number = placed.get(layer, (Site(layer), None))
            transcoder = None if number is None else tcs[number]
            sites.append(site)
            functions.append(_Layer(state, site, transcoder, by_layer.get(layer, []), layer in constrained))
        with overridden(model, sites, functions):
            yield model


class _Layer:
    """What one layer's MLP puts out instead: a function for :func:`fasttc.models.overridden`."""

    def __init__(
        self,
        state: Held,
        site: Site,
        transcoder: Transcoder | None,
        interventions: list[Intervention],
        constrained: bool,
    ) -> None:
        self.state, self.site, self.transcoder = state, site, transcoder
        self.interventions, self.constrained = interventions, constrained
        self._original: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None, "overridden with needs_output gives the true output"
        if self.state.original:
            self._original = (x, y)
            return y
        if self.constrained:
            assert self._original is not None, "the original pass ran first"
            x_before, y = self._original
            if self.transcoder is not None and self.transcoder.W_skip is not None:
                skip = self.transcoder.W_skip
                y = y + ((x - x_before).to(skip) @ skip.T).to(y)
            x = x_before
        change = self._change(x)
        return y if change is None else y + change.to(y)

    def _change(self, x: Tensor) -> Tensor | None:
        """``[batch, T, D_out]`` to add to y; None where no token is reached."""
        masks = [
            change.reached(self.state.start, x.shape[1], self.state.prompt, self.site.zero_positions)
            for change in self.interventions
        ]
        if not any(bool(mask.any()) for mask in masks):
            return None
        assert self.transcoder is not None, "interventions are on layers with transcoders"
        weights = self.transcoder.W_dec
        token, feature, value = self.transcoder.encode(x.to(weights.device)).active()
        columns = self._columns(feature)
        place = feature.new_full((len(weights),), -1)
        place[columns] = torch.arange(len(columns), device=place.device)
        found = place[feature] >= 0
        old = value.new_zeros(x[..., 0].numel(), len(columns))
        old = old.index_put((token[found], place[feature[found]]), value[found])
        new = old
        for change, mask in zip(self.interventions, masks, strict=True):
            touched = mask.to(old.device).repeat(x.shape[0])[:, None]
            if change.indices is not None:
                chosen = torch.tensor(change.indices, device=columns.device)
                touched = touched & torch.isin(columns, chosen)
            new = torch.where(touched, change.applied(new), new)
        return ((new - old).to(weights.dtype) @ weights[columns]).view(*x.shape[:-1], -1)

    def _columns(self, active: Tensor) -> Tensor:
        """All features that are concerned, ascending."""
        named = [index for change in self.interventions for index in change.indices or ()]
        columns = torch.tensor(named, dtype=torch.int64, device=active.device)
        if any(change.indices is None for change in self.interventions):
            columns = torch.cat([columns, active])
        return columns.unique()
