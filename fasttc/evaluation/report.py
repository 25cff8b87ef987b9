"""What an evaluation found, as data and as a table."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fasttc._files import finite


@dataclass(frozen=True)
class LayerReport:
    """One layer's transcoder.

    Attributes:
        layer: of the model.
        fvu: ``sum_t ||yhat_t - y_t||^2 / (sum_t ||y_t||^2 - n ||mean y||^2)``; 1 is no better than the mean.
        mse: ``mean_t ||yhat_t - y_t||^2``.
        l0: mean active features per token.
        n_features: F.
        dead: features that never fired on these tokens.
        dense: features that fired on more than ``dense_above`` of them.
        ce_replaced: next-token cross-entropy with this layer's MLP alone replaced; None where not measured.
        ce_ablated: the same with this layer's MLP alone removed.
        recovered: ``(ce_ablated - ce_replaced) / (ce_ablated - ce_original)``.
        encoder_cosine, decoder_cosine: mean over features of the cosine to the base's row; None without a base.
        lowest_encoder_cosine, lowest_decoder_cosine: the smallest of them.
    """

    layer: int
    fvu: float
    mse: float
    l0: float
    n_features: int
    dead: int
    dense: int
    ce_replaced: float | None = None
    ce_ablated: float | None = None
    recovered: float | None = None
    encoder_cosine: float | None = None
    decoder_cosine: float | None = None
    lowest_encoder_cosine: float | None = None
    lowest_decoder_cosine: float | None = None


@dataclass(frozen=True)
class FeatureReport:
    """One layer, feature by feature; float64 [F] on the CPU. ``None`` without a base.

    Attributes:
        firing_rate: share of tokens on which the feature was active.
        encoder_cosine, decoder_cosine: between the feature's row and the base's.
    """

    firing_rate: Tensor
    encoder_cosine: Tensor | None = None
    decoder_cosine: Tensor | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`fasttc.evaluation.evaluate` returns.

    Attributes:
        tokens: positions on which FVU, MSE and L0 were measured.
        predictions: positions on which KL, top-1 error and cross-entropies were measured.
        fvu, l0: means over layers.
        kl: ``mean_t KL(p_original || p_replaced)`` in nats, all layers replaced.
        top1_error: share of positions whose most probable token changes, all layers replaced.
        ce_original, ce_replaced, ce_ablated: next-token cross-entropy in nats: as it is, all layers replaced, all
            MLPs of these layers removed.
        recovered: ``(ce_ablated - ce_replaced) / (ce_ablated - ce_original)``.
        layers: one entry per transcoder.
        settings: how it was measured.
        hints: what should make a reader suspicious.
        features: one entry per transcoder; not part of :meth:`to_dict`.
    """

    tokens: int
    predictions: int
    fvu: float
    l0: float
    kl: float
    top1_error: float
    ce_original: float
    ce_replaced: float
    ce_ablated: float
    recovered: float
    layers: tuple[LayerReport, ...]
    settings: dict[str, Any]
    hints: tuple[str, ...] = ()
    features: tuple[FeatureReport, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; a number that is not finite becomes None."""
        content = {name: value for name, value in vars(self).items() if name not in ("features", "layers")}
        return finite({**content, "layers": [asdict(layer) for layer in self.layers]})

    def __str__(self) -> str:
        """A compact table."""
        return "\n".join([*self._summary(), "", *self._rows(), *(f"hint: {hint}" for hint in self.hints)])

    def _summary(self) -> list[str]:
        return [
            f"{self.tokens:,} tokens, {self.predictions:,} predictions, {len(self.layers)} layers",
            f"FVU {self.fvu:.4f}   L0 {self.l0:.1f}   KL {self.kl:.4f}   top-1 error {100 * self.top1_error:.2f} %",
            f"CE original {self.ce_original:.4f}   replaced {self.ce_replaced:.4f}   "
            f"ablated {self.ce_ablated:.4f}   recovered {self.recovered:.4f}",
        ]

    def _rows(self) -> list[str]:
        columns = [  # title, width, format, attribute
            ("layer", 5, "d", "layer"),
            ("FVU", 8, ".4f", "fvu"),
            ("MSE", 10, ".4g", "mse"),
            ("L0", 7, ".1f", "l0"),
            ("dead", 7, "d", "dead"),
            ("dense", 6, "d", "dense"),
            ("CE repl.", 9, ".4f", "ce_replaced"),
            ("CE abl.", 9, ".4f", "ce_ablated"),
            ("recov.", 8, ".4f", "recovered"),
            ("cos enc", 8, ".4f", "encoder_cosine"),
            ("cos dec", 8, ".4f", "decoder_cosine"),
        ]
        shown = [c for c in columns if any(getattr(layer, c[3]) is not None for layer in self.layers)]
        lines = ["".join(f"{title:>{width}}" for title, width, _, _ in shown)]
        for layer in self.layers:
            cells = [(getattr(layer, name), width, form) for _, width, form, name in shown]
            lines.append(
                "".join(f"{'-' if v is None else format(v, form):>{width}}" for v, width, form in cells)
            )
        return lines
