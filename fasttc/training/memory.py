"""What training transcoders will need: an estimate by arithmetic, printed before anything large is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fasttc.nn import Transcoder
from fasttc.ops import _torch as cpu_path
from fasttc.training.closed_form import HELD_OUT_TOKENS
from fasttc.training.gram import DENSE_FEATURES, PAIRS_AT_ONCE
from fasttc.training.options import TranscoderOptions

FLOAT, DOUBLE, INDEX = 4, 8, 8


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak beyond the model and the base's transcoders, by what they are for.

    Attributes:
        parts: name -> bytes.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {_human(size)}" for name, size in self.parts.items() if size)
        return f"about {_human(self.total)} beside model and base: {shown}"


def estimate(
    model: Any,
    transcoders: Sequence[Transcoder],
    options: TranscoderOptions,
    context: int,
    trained: Sequence[str] | None = None,
) -> MemoryEstimate:
    """The peak of a training of ``transcoders``.

    Args:
        model: whose activations are read; for the size of its forward pass.
        transcoders: of the sizes in question; they may be on the meta device.
        options: of the training.
        context: tokens in a row.
        trained: names of trained parameters; None: all.

    Returns:
        Float32 weights, their gradients and Adam's two moments, and a copy for the best look; two float64 matrices
        [D, D] for every layer whose inputs are whitened; the activations of a block at every site, twice where they
        are mixed; held-out activations (x also as it was before whitening) and the sums of closed forms; what one
        encode of an update and one forward of a batch need on the way. A closed form alone takes no gradient. Sums
        over pairs of features (F above 4096) are counted at their bound: every pair that K features of the tokens can
        make.
    """
    weights = [(name, p.numel()) for t in transcoders for name, p in t.named_parameters()]
    steps = options.refit != "only"
    moved = FLOAT * sum(n for name, n in weights if trained is None or name in trained) * steps
    batch, block = options.batch_size * context, options.block_rows * context
    update = block // options.parts(context) if steps else block
    mixed = block > min(batch, update)
    widths = sum(t.d_in + t.d_out for t in transcoders)
    whitens = options.whitens(trained, any(t.skip for t in transcoders))
    outside = sum(t.d_in for t in transcoders) if whitens else 0
    parts = {
        "weights": FLOAT * sum(n for _, n in weights),
        "gradients": moved,
        "Adam": 2 * moved,
        "best weights": FLOAT * sum(n for _, n in weights) if options.patience is not None else 0,
        "whitening": 2 * DOUBLE * sum(t.d_in**2 for t in transcoders) if whitens else 0,
        "activations": FLOAT * widths * (2 * block if mixed else block),
        "held-out activations": FLOAT * (widths + outside) * HELD_OUT_TOKENS,
        "closed form": _closed_form(transcoders, options, update if options.refit == "last" else block),
        "encode": max((_encode(t, update) for t in transcoders), default=0),
        "model": _forward(model, batch, context),
    }
    return MemoryEstimate(parts)


def _closed_form(transcoders: Sequence[Transcoder], options: TranscoderOptions, tokens: int) -> int:
    """Sums of all layers, and what adding some tokens to them or solving one layer needs at the most."""
    if options.refit is None:
        return 0
    kept, passing = 0, 0
    for t in transcoders:
        rows = t.n_features + (t.d_in if t.skip else 0)
        columns = t.d_out + 1 + (t.d_in if t.skip else 0)
        if t.n_features <= DENSE_FEATURES:
            gram, solving = DOUBLE * t.n_features**2, 5 * DOUBLE * rows**2
        else:
            made = options.tokens * _k(t) * (_k(t) + 1) // 2
            gram = (DOUBLE + INDEX) * min(t.n_features * (t.n_features + 1) // 2, made)
            solving = 4 * gram  # pairs sorted and merged; then both triangles in float32
        kept += gram + DOUBLE * rows * columns
        pairs = min(PAIRS_AT_ONCE, tokens * _k(t) * (_k(t) + 1) // 2)
        passing = max(passing, solving + 5 * DOUBLE * rows * columns, 3 * (DOUBLE + INDEX) * pairs)
    return kept + passing


def _k(transcoder: Transcoder) -> int:
    """Active features of a token: k, or for activations without one what transcoders usually have."""
    return transcoder.k or 64


def _encode(transcoder: Transcoder, tokens: int) -> int:
    """One encode with its selection: a block of pre-activations, and the entries of an update with their gradients."""
    block = min(tokens * transcoder.n_features, cpu_path.BLOCK_ELEMENTS)
    return FLOAT * block + 8 * INDEX * tokens * _k(transcoder)


def _forward(model: Any, tokens: int, context: int) -> int:
    """One layer of the model at a time: hidden states, the inner width of the MLP thrice, attention scores twice."""
    config = model.config
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    hidden = FLOAT * tokens * (6 * config.hidden_size + 3 * inner)
    return hidden + 2 * FLOAT * tokens * context * config.num_attention_heads


def _human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
