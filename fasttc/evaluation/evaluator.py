"""evaluate: how well transcoders stand in for a model's MLPs, on held-out text."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fasttc.evaluation import metrics
from fasttc.evaluation.carry_over import check_same
from fasttc.evaluation.metrics import FeatureStatistics, Prediction, recovered, row_cosines
from fasttc.evaluation.report import FeatureReport, LayerReport, Report
from fasttc.models import anatomy, capture, check_match, evaluating, overridden
from fasttc.nn import TranscoderSet
from fasttc.training.data import TokenData, open_data
from fasttc.training.packing import NO_LABEL, TokenBatch


def evaluate(
    model: nn.Module,
    tcs: TranscoderSet,
    data: Any,
    *,
    tokenizer: Any = None,
    base: TranscoderSet | None = None,
    text: str | None = None,
    split: str = "test",
    tokens: int | None = 32_768,
    batch_size: int = 8,
    context: int = 128,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    split_seed: int = 0,
    per_layer: bool = True,
    dense_above: float = 0.1,
    progress: bool = False,
) -> Report:
    """Measures transcoders against the MLPs they stand for.

    The first token of every document, padding, and further positions that the sites zero are left out everywhere:
    they are not counted, and there the true MLP stays in place, as in an attribution graph. The model runs
    in evaluation mode, is put back afterwards, and is otherwise untouched. Deterministic for given data.

    Args:
        model: a Hugging Face causal language model of a supported family, PEFT wrappers included.
        tcs: transcoders of all or some of its layers.
        data: a :class:`fasttc.training.data.TokenData`, or whatever
            :func:`fasttc.training.documents.read_documents` reads. A file that was held out by hand is used whole
            with ``fractions=(0, 0, 1)``.
        tokenizer: for text; not needed for token ids or a ``TokenData``.
        base: transcoders that ``tcs`` came from: adds the cosine of every feature to its origin.
        text, context, fractions, split_seed: see :func:`fasttc.training.data.open_data`; not used for a
            ``TokenData``.
        split: "train", "validation" or "test".
        tokens: stops after about so many; None: the whole split.
        batch_size: rows of ``context`` tokens in one forward.
        per_layer: measures also each layer replaced alone and ablated alone (two forwards more per layer).
        dense_above: a feature that fires on a larger share of tokens is dense.
        progress: shows a bar.

    Returns:
        A :class:`Report`; ``print(report)`` shows a table. An FVU above 1 comes with a hint.

    Raises:
        ValueError: transcoders that do not fit the model or the base; data without tokens to measure; options out
            of range.
    """
    _check_options(tokens, dense_above)
    check_match(model, tcs, tcs.layers)
    features = _drift(tcs, base)
    opened = open_data(
        model, data, tokenizer, text=text, context=context, fractions=fractions, split_seed=split_seed
    )
    batches = opened.batches(split, batch_size, max_tokens=tokens)
    with (
        evaluating(model, *tcs),
        _Variants(model, tcs, per_layer) as run,
        torch.no_grad(),
        tqdm(total=tokens, desc="evaluate", unit="tok", disable=not progress) as bar,
    ):
        for batch in batches:
            run.add(batch)
            bar.update(batch.n_tokens)
    if run.statistics[0].result(0).tokens == 0 or run.original.count == 0:
        raise ValueError("data: expected documents of at least three tokens, got none in what was read")
    settings = {"split": split, **_settings(opened, batch_size), "dense_above": dense_above}
    return _report(tcs, run, features, dense_above, settings)


def _check_options(tokens: int | None, dense_above: float) -> None:
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        raise ValueError(f"tokens: expected an int >= 1 or None, got {tokens!r}")
    if not 0 < dense_above < 1:
        raise ValueError(f"dense_above: expected a share between 0 and 1, got {dense_above!r}")


def _settings(data: TokenData, batch_size: int) -> dict[str, Any]:
    return {"data": data.fingerprint, "context": data.context, "batch_size": batch_size}


class _Mode(Enum):
    ORIGINAL = "original"
    REPLACED = "replaced"
    ABLATED = "ablated"


class _Variants:
    """The model with every layer switchable between its MLP, its transcoder and nothing; sums over all variants.

    A context manager: inside, the model is overridden.
    """

    def __init__(self, model: nn.Module, tcs: TranscoderSet, per_layer: bool) -> None:
        self._model = model
        self._tcs = tcs
        parts = anatomy(model)
        self._trunk = model.get_submodule(parts.trunk)
        self._head: Any = model.get_submodule(parts.lm_head)
        self._softcap = parts.final_softcap
        self._rows_at_once = max(1, metrics.LOGITS_AT_ONCE // parts.vocab_size)
        self._skipped = max(site.zero_positions for site in tcs.sites)
        self._modes = [_Mode.ORIGINAL] * len(tcs)
        self._measured = torch.zeros(0)  # [B, T, 1] bool: where a variant differs from the original
        self.statistics = [FeatureStatistics(tc) for tc in tcs]
        self.original, self.replaced, self.ablated = Prediction(), Prediction(), Prediction()
        alone = len(tcs) if per_layer else 0
        self.replaced_alone = [Prediction() for _ in range(alone)]
        self.ablated_alone = [Prediction() for _ in range(alone)]

    def __enter__(self) -> "_Variants":
        functions = [self._function(index) for index in range(len(self._tcs))]
        self._overridden = overridden(self._model, self._tcs.sites, functions)
        self._overridden.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._overridden.__exit__(*error)

    def _function(self, index: int):
        transcoder = self._tcs[index]

        def function(x: Tensor, y: Tensor | None) -> Tensor:
            assert y is not None, "overridden with needs_output gives the true output"
            mode = self._modes[index]
            if mode is _Mode.ORIGINAL:
                return y
            if mode is _Mode.ABLATED:
                return y.masked_fill(self._measured.to(y.device), 0.0)
            instead = transcoder(x.to(transcoder.W_enc.device)).to(y)
            return torch.where(self._measured.to(y.device), instead, y)

        return function

    def add(self, batch: TokenBatch) -> None:
        """Runs all variants on one block."""
        batch = batch.to(next(self._model.parameters()).device)
        measured = batch.mask & (batch.position_ids >= self._skipped)
        self._measured = measured[..., None]
        rows = measured.flatten().nonzero()[:, 0]

        def on_layer(index: int, x: Tensor, y: Tensor) -> None:
            device = self._tcs[index].W_enc.device
            self.statistics[index].add(*(_rows(tensor, rows).to(device) for tensor in (x, y)))

        with capture(self._model, self._tcs.sites, on_layer=on_layer):
            final = self._final(batch, {})
        labels = batch.labels.flatten()
        predicting = (measured.flatten() & (labels != NO_LABEL)).nonzero()[:, 0]
        labels, original = labels[predicting], final[predicting]
        everything = range(len(self._tcs))

        def count(prediction: Prediction, modes: dict[int, _Mode], compare: bool = False) -> None:
            final = self._final(batch, modes)[predicting]
            against = original if compare else None
            prediction.add(self._logits, final, labels, against, rows_at_once=self._rows_at_once)

        self.original.add(self._logits, original, labels, rows_at_once=self._rows_at_once)
        count(self.replaced, dict.fromkeys(everything, _Mode.REPLACED), compare=True)
        count(self.ablated, dict.fromkeys(everything, _Mode.ABLATED))
        for index, (replaced, ablated) in enumerate(
            zip(self.replaced_alone, self.ablated_alone, strict=True)
        ):
            count(replaced, {index: _Mode.REPLACED})
            count(ablated, {index: _Mode.ABLATED})

    def _final(self, batch: TokenBatch, modes: dict[int, _Mode]) -> Tensor:
        """Outputs of the last norm, [B·T, D], with the given layers switched."""
        self._modes = [modes.get(index, _Mode.ORIGINAL) for index in range(len(self._tcs))]
        return self._trunk(**batch.model_inputs).last_hidden_state.flatten(0, 1)

    def _logits(self, final: Tensor) -> Tensor:
        logits = self._head(final)
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of [B, T, D] as [n, D], float32 (float64 stays)."""
    kept = tensor.flatten(0, 1)[rows.to(tensor.device)]
    return kept if kept.dtype == torch.float64 else kept.float()


def _drift(tcs: TranscoderSet, base: TranscoderSet | None) -> list[tuple[Tensor | None, Tensor | None]]:
    """Per layer, cosines of encoder and decoder rows to the base's; Nones without a base."""
    if base is None:
        return [(None, None)] * len(tcs)
    check_same(base, tcs)
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for ours, theirs in zip(tcs, base, strict=True):
        found.append((row_cosines(ours.W_enc, theirs.W_enc), row_cosines(ours.W_dec, theirs.W_dec)))
    return found


def _report(
    tcs: TranscoderSet,
    run: _Variants,
    drift: list[tuple[Tensor | None, Tensor | None]],
    dense_above: float,
    settings: dict[str, Any],
) -> Report:
    ce = run.original.mean(run.original.ce)
    features = [
        FeatureReport(statistic.firing_rates(), *cosines)
        for statistic, cosines in zip(run.statistics, drift, strict=True)
    ]
    layers = [_layer_report(tcs, run, index, features[index], dense_above) for index in range(len(tcs))]
    hints = [
        f"layer {layer.layer}: FVU {layer.fvu:.3g} is worse than predicting the mean: these transcoders belong to "
        f"another model, or do not read {site.x} and write {site.y}"
        for layer, site in zip(layers, tcs.sites, strict=True)
        if layer.fvu > 1
    ]
    replaced, ablated = run.replaced.mean(run.replaced.ce), run.ablated.mean(run.ablated.ce)
    return Report(
        tokens=run.statistics[0].result(0).tokens,
        predictions=run.original.count,
        fvu=sum(layer.fvu for layer in layers) / len(layers),
        l0=sum(layer.l0 for layer in layers) / len(layers),
        kl=run.replaced.mean(run.replaced.kl),
        top1_error=run.replaced.mean(run.replaced.top1),
        ce_original=ce,
        ce_replaced=replaced,
        ce_ablated=ablated,
        recovered=recovered(ce, replaced, ablated),
        layers=tuple(layers),
        settings=settings,
        hints=tuple(hints),
        features=tuple(features),
    )


def _layer_report(
    tcs: TranscoderSet, run: _Variants, index: int, features: FeatureReport, dense_above: float
) -> LayerReport:
    layer, rates = tcs.sites[index].layer, features.firing_rate
    quality = run.statistics[index].result(layer)
    optional: dict[str, float] = {}
    if run.replaced_alone:
        pair = (run.replaced_alone[index], run.ablated_alone[index])
        replaced, ablated = (prediction.mean(prediction.ce) for prediction in pair)
        share = recovered(run.original.mean(run.original.ce), replaced, ablated)
        optional = {"ce_replaced": replaced, "ce_ablated": ablated, "recovered": share}
    for name in ("encoder_cosine", "decoder_cosine"):
        cosines = getattr(features, name)
        if cosines is not None:
            optional |= {name: float(cosines.mean()), f"lowest_{name}": float(cosines.min())}
    return LayerReport(
        layer,
        quality.fvu,
        quality.mse,
        quality.l0,
        n_features=len(rates),
        dead=int((rates == 0).sum()),
        dense=int((rates > dense_above).sum()),
        **optional,
    )
