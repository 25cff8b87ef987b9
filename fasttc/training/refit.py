"""Closed form: with the encoder frozen, the best decoder is a ridge regression on sparse codes.

``min_W,b sum_t ||y_t - a_t W - b||^2 + sum_f λ_f ||W_f - W0_f||^2`` shrinks towards the decoder that is there (W0: the
base's, or what training has reached), with ``λ_f = ridge * m_f``, m_f the mean square of feature f where it is active:
W0 counts for as much as ``ridge`` tokens on which the feature fires. This does not depend on the units of the codes,
and a feature that hardly fires keeps its row. With a skip connection x joins the codes. m_f is at least
:data:`LEAST_UNIT` of the features' mean: rows that explain a residual r by a few tiny codes a would grow as r / a, and
shout where the feature for once fires as others do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fasttc import ops
from fasttc.nn import Transcoder
from fasttc.ops import SparseActs
from fasttc.training.gram import DENSE_FEATURES, Gram

RIDGES = (300.0, 100.0, 30.0, 10.0, 3.0, 1.0)
"""Weights of the old decoder, in tokens, among which held-out tokens choose; strongest first."""
LEAST_UNIT = 0.01
"""Of the features' mean m_f: codes below a tenth of the usual size count as if they were of that size."""
CG_STEPS, CG_TOLERANCE = 200, 1e-3
"""Where conjugate gradients end: on held-out tokens such a decoder is within one in 10^4 of the exact one."""
_SUMS = ("targets", "inputs", "sum", "y_sum", "fired")


class Decoder(NamedTuple):
    """W_dec [F, D_out], b_dec [D_out], W_skip [D_out, D] or None; float64."""

    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None

    @torch.no_grad()
    def write_to(self, transcoder: Transcoder) -> None:
        for name, value in self._asdict().items():
            if value is not None:
                transcoder.get_parameter(name).copy_(value)


class DecoderSums:
    """What the regression needs of a stream of tokens: first and second moments of codes, inputs and outputs.

    In float64; the memory is that of :class:`fasttc.training.gram.Gram` and of two decoders. Codes may come from an
    encoder that is still moving: the sums are those of the codes as they were.

    Args:
        transcoder: gives the sizes, and whether x takes part.
        dense_features: see :class:`fasttc.training.gram.Gram`.
    """

    def __init__(self, transcoder: Transcoder, *, dense_features: int = DENSE_FEATURES) -> None:
        make = {"dtype": torch.float64, "device": transcoder.W_enc.device}
        self.n_features, self.skip = transcoder.n_features, transcoder.d_in if transcoder.skip else 0
        width = self.n_features + self.skip
        self.tokens = 0
        self._gram = Gram(self.n_features, transcoder.W_enc.device, dense_features=dense_features)
        self._targets = torch.zeros(width, transcoder.d_out, **make)  # Z^T y, Z = [codes, x]
        self._inputs = torch.zeros(width, self.skip, **make)  # Z^T x
        self._sum = torch.zeros(width, **make)
        self._y_sum = torch.zeros(transcoder.d_out, **make)
        self._fired = torch.zeros(self.n_features, **make)

    @torch.no_grad()
    def add(self, acts: SparseActs, x: Tensor, y: Tensor) -> None:
        """Counts N tokens: their codes, x [N, D] (used with a skip connection only) and y [N, D_out]."""
        acts = replace(acts, values=acts.values.detach().double(), gates=None)
        x, y, n, d_out = x.double(), y.double(), self.n_features, y.shape[1]
        self._gram.add(acts)
        columns = [y, y.new_ones(len(y), 1), *([x] if self.skip else [])]
        sums = ops.segment(acts, torch.cat(columns, 1))
        self._targets[:n] += sums[:, :d_out]
        self._sum[:n] += sums[:, d_out]
        self._fired += torch.bincount(acts.active()[1], minlength=n)
        self._y_sum += y.sum(0)
        self.tokens += len(y)
        if self.skip:
            self._inputs[:n] += sums[:, d_out + 1 :]
            self._inputs[n:] += x.T @ x
            self._targets[n:] += x.T @ y
            self._sum[n:] += x.sum(0)

    @property
    def finite(self) -> bool:
        """Whether nothing that was added overflowed or was not a number."""
        return bool(self._targets.isfinite().all())

    def state(self) -> dict[str, Tensor]:
        """All sums by name."""
        count = torch.tensor(self.tokens)
        return {name: getattr(self, f"_{name}") for name in _SUMS} | self._gram.state() | {"tokens": count}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over a state."""
        for name in _SUMS:
            getattr(self, f"_{name}").copy_(tensors[name])
        self._gram.restore(tensors)
        self.tokens = int(tensors["tokens"])

    @torch.no_grad()
    def solutions(self, transcoder: Transcoder, ridges: Sequence[float]) -> Iterator[tuple[float, Decoder]]:
        """(ridge, decoder) for every ridge, shrunk towards the decoder of ``transcoder``, which is not changed."""
        tokens = max(self.tokens, 1)
        mean, y_mean = self._sum / tokens, self._y_sum / tokens
        skip = [] if transcoder.W_skip is None else [transcoder.W_skip.T]
        old = torch.cat([transcoder.W_dec, *skip]).double()
        product, diagonal = self._centred(mean)
        missing = self._targets - torch.outer(self._sum, y_mean) - product(old)
        unit, change = self._units(), torch.zeros_like(old)
        matrix = self._matrix(mean) if self._gram.is_dense else None
        for ridge in ridges:
            if matrix is not None:
                change = torch.cholesky_solve(missing, torch.linalg.cholesky(matrix + (ridge * unit).diag()))
            else:
                change = conjugate_gradients(product, diagonal, ridge * unit, missing, change)
            W, n = old + change, self.n_features
            yield ridge, Decoder(W[:n], y_mean - mean @ W, W[n:].T if self.skip else None)

    def _centred(self, mean: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """``v -> (Z^T Z - tokens mean mean^T) v``, and the diagonal of that matrix."""
        codes, n, inputs = self._gram.product(), self.n_features, self._inputs

        def product(v: Tensor) -> Tensor:
            upper = codes(v[:n]) + inputs[:n] @ v[n:]
            lower = inputs[:n].T @ v[:n] + inputs[n:] @ v[n:]
            return torch.cat([upper, lower]) - torch.outer(self._sum, mean @ v)

        squares = torch.cat([self._gram.diagonal(), inputs[n:].diagonal()])
        return product, squares - self._sum * mean

    def _matrix(self, mean: Tensor) -> Tensor:
        """The centred matrix itself [F + D, F + D]."""
        codes_inputs, inputs = self._inputs.split([self.n_features, self.skip])
        codes = torch.cat([self._gram.dense(), codes_inputs], 1)
        return torch.cat([codes, torch.cat([codes_inputs.T, inputs], 1)]) - torch.outer(self._sum, mean)

    def _units(self) -> Tensor:
        """m of every regressor, [F + D]; of those never seen the mean of the others."""
        fired = torch.cat([self._fired, self._fired.new_full((self.skip,), float(self.tokens))])
        squares = torch.cat([self._gram.diagonal(), self._inputs[self.n_features :].diagonal()])
        unit = squares / fired.clamp(min=1)
        seen = unit > 0
        usual = unit[seen].mean() if bool(seen.any()) else unit.new_ones(())
        return unit.where(seen, usual).clamp(min=LEAST_UNIT * usual)


@torch.no_grad()
def refit(
    transcoder: Transcoder,
    sums: DecoderSums,
    x: Tensor,
    y: Tensor,
    ridges: Sequence[float] = RIDGES,
) -> float | None:
    """Puts the best closed-form decoder into ``transcoder``.

    Args:
        transcoder: its encoder gave the codes in ``sums``.
        sums: over training tokens.
        x, y: [N, D] and [N, D_out] of held-out tokens, which choose the ridge.
        ridges: to choose from, strongest first; none is tried below the first that is worse than the one before.

    Returns:
        The chosen ridge; None where the decoder that was there is better on the held-out tokens, and stays.
    """
    acts, y = transcoder.encode(x), y.double()

    def error(W_dec: Tensor, b_dec: Tensor, W_skip: Tensor | None) -> float:
        init = None if W_skip is None else x @ W_skip.T.to(x.dtype)
        found = ops.decode(acts, W_dec.to(acts.values.dtype), b_dec.to(acts.values.dtype), init=init)
        return float((found.double() - y).square().sum())

    best: tuple[float, float | None, Decoder | None]
    best = error(transcoder.W_dec, transcoder.b_dec, transcoder.W_skip), None, None
    before = float("inf")
    for ridge, decoder in sums.solutions(transcoder, ridges):
        found = error(*decoder)
        if found >= before:
            break
        before = found
        if found < best[0]:
            best = found, ridge, decoder
    if best[2] is not None:
        best[2].write_to(transcoder)
    return best[1]


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], diagonal: Tensor, penalty: Tensor, b: Tensor, start: Tensor
) -> Tensor:
    """Solves ``(M + diag(penalty)) v = b`` for every column of b [n, m], with the diagonal as preconditioner.

    Args:
        product: ``v -> M v``, M symmetric and not negative; diagonal: of M.
        start: first guess.

    Returns:
        [n, m] with every residual below a thousandth of its column of b, or as they stand after 200 steps.
    """
    scale = 1 / (diagonal + penalty).clamp(min=torch.finfo(b.dtype).tiny)[:, None]
    v, wanted = start.clone(), CG_TOLERANCE * b.norm(dim=0)
    residual = b - product(v) - penalty[:, None] * v
    z = scale * residual
    direction, old = z, (residual * z).sum(0)
    for _ in range(CG_STEPS):
        if bool((residual.norm(dim=0) <= wanted).all()):
            break
        image = product(direction) + penalty[:, None] * direction
        curvature = (direction * image).sum(0)
        step = old / curvature.where(curvature > 0, 1.0)
        v = v + step * direction
        residual = residual - step * image
        z = scale * residual
        new = (residual * z).sum(0)
        direction = z + new / old.where(old > 0, 1.0) * direction
        old = new
    return v
