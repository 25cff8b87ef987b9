"""When features are active, side by side over a corpus: which of them fire together."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from fasttc.analysis.features import Array, features_by_transcoder
from fasttc.models import check_match
from fasttc.nn import TranscoderSet
from fasttc.training.activations import activation_source
from fasttc.training.data import open_data


@torch.no_grad()
def feature_activations(
    model: nn.Module,
    tcs: TranscoderSet,
    data: Any,
    features: Iterable[tuple[int, int]],
    *,
    tokenizer: Any = None,
    text: str | None = None,
    split: str = "train",
    tokens: int | None = 20_000,
    batch_size: int = 8,
    context: int = 128,
    split_seed: int = 0,
) -> Array:
    """Activations of some features on every token of a corpus.

    The cosine of two rows says how much two features fire together. The first token of a document and padding are left
    out, as everywhere.

    Args:
        model: of a supported family; it is not changed.
        tcs: transcoders of all or some of its layers.
        data, tokenizer, text, context, split_seed: see :func:`fasttc.training.data.open_data`.
        features: (layer, index) pairs.
        split: "train", "validation" or "test".
        tokens: stops after about so many; None: the whole split.
        batch_size: rows of ``context`` tokens in one forward.

    Returns:
        ``[features, tokens]`` float32, features sorted and without repetitions. Deterministic on one machine.

    Raises:
        ValueError: transcoders that do not fit, a feature that does not exist, data without tokens.
    """
    check_match(model, tcs, tcs.layers)
    wanted = features_by_transcoder(tcs, features)
    opened = open_data(model, data, tokenizer, text=text, context=context, split_seed=split_seed)
    parts = []
    with activation_source(model, tcs.sites) as source:
        for batch in opened.batches(split, batch_size, max_tokens=tokens):
            read = zip(tcs, source.read(batch)[0], wanted, strict=True)
            parts.append(np.concatenate([_rows(tc, x, chosen) for tc, x, chosen in read]))
    if not sum(part.shape[1] for part in parts):
        raise ValueError("data: expected documents of at least two tokens, got none in what was read")
    return np.concatenate(parts, axis=1)


def _rows(transcoder: Any, x: torch.Tensor, chosen: Array) -> Array:
    """``[chosen, tokens]`` of one transcoder on one block."""
    found = np.zeros((len(chosen), len(x)), np.float32)
    if len(chosen):
        at, features, values = (one.cpu() for one in transcoder.encode(x.to(transcoder.W_enc)).active())
        row = np.full(transcoder.n_features, -1)
        row[chosen] = np.arange(len(chosen))
        rows = row[features.numpy()]
        found[rows[rows >= 0], at.numpy()[rows >= 0]] = values.float().numpy()[rows >= 0]
    return found
