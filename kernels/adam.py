"""Row-wise Adam inside the segment sums: a weight row is updated where its gradient was added up.

For feature f with gradient row g (``segment.py``), the formulas of ``torch.optim.AdamW`` in float32::

    m = m + (1 - beta1) (g - m)         v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr weight_decay) - lr / (1 - beta1^t) · m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

then, if asked, ``p / |p|`` (decoder rows of length one) and a half-precision copy of p. The gradient matrix [F, D] is
never stored: 26 instead of 34 bytes per parameter go through memory.

*Dense* rows (default) equal the unfused optimiser to rounding: rows without an entry have gradient zero and still
move by their momentum. *Lazy* rows (opt-in, semantics of ``torch.optim.SparseAdam`` with decay): a row without an
entry is not touched; when it is next touched, Δ = t - last_step steps after the last time, its moments and its weight
decay are advanced by ``beta1^Δ``, ``beta2^Δ`` and ``(1 - lr weight_decay)^Δ`` in one go, while the moves that dense
Adam would have made in between are left out.

No atomics; bitwise equal from run to run. A clipped global gradient norm or accumulated gradients need the gradient
first: use ``segment.py`` and an ordinary optimiser for those.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttc.kernels._aot import DTYPES, aligned, case
from fasttc.kernels._features import (
    STREAMS,
    FeatureOrder,
    FeatureSums,
    Terms,
    feature_of_program,
    feature_sums,
    prepare,
)
from fasttc.kernels._lang import rounded, row_offset
from fasttc.kernels._launch import AotCase, KernelConfig, cdiv, config, config_table, configure, on_device

_HALF = config_table(
    config(num_warps=2, num_stages=1, BLOCK_D=512, ROWS=4, CUT=256),
    gfx942=config(num_warps=1, num_stages=1, BLOCK_D=512, ROWS=4, CUT=256),
)
_SINGLE = config_table(  # as many columns per load and lane, hence twice the warps; two warps spill on sm_100
    config(num_warps=4, num_stages=1, BLOCK_D=512, ROWS=4, CUT=256),
    gfx942=config(num_warps=2, num_stages=1, BLOCK_D=512, ROWS=4, CUT=256),
)


@dataclass(frozen=True)
class RowState:
    """A weight matrix [F, D] float32 with its moments, updated in place; all contiguous.

    Attributes:
        weight, m, v: [F, D] float32.
        shadow: None, or [F, D] bfloat16 or float16: the rounded copy that the forward pass reads.
        unit_norm: scale every updated row to length one.
    """

    weight: Tensor
    m: Tensor
    v: Tensor
    shadow: Tensor | None = None
    unit_norm: bool = False


@dataclass(frozen=True)
class AdamStep:
    """Constants of one step (``step`` counts from 1), as ``torch.optim.AdamW`` names them."""

    step: int
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def scalars(self) -> tuple[float, ...]:
        """The numbers of the kernel, from ``step_size`` to ``log_kept``, computed in float64."""
        kept = 1 - self.lr * self.weight_decay
        decays = (self.beta1, self.beta2, kept)
        return (
            self.lr / (1 - self.beta1**self.step),
            math.sqrt(1 - self.beta2**self.step),
            self.eps,
            1 - self.beta1,
            1 - self.beta2,
            *decays,
            *(math.log2(decay) if decay > 0 else -math.inf for decay in decays),
        )


@triton.jit
def _power(base, log_base, exponent):
    """``base ^ exponent``, exactly ``base`` for exponent 1, the common case."""
    return tl.where(exponent == 1, base, tl.exp2(exponent * log_base))


@triton.jit
def _update(
    grad,
    weight_ptr,
    m_ptr,
    v_ptr,
    shadow_ptr,
    offset,
    inside,
    step_size,
    root_correction,
    eps,
    rest1,
    rest2,
    decay1,
    decay2,
    kept,
    STORE_SHADOW: tl.constexpr,
):
    """Adam on one slice of a row; returns the new weights."""
    m = decay1 * tl.load(m_ptr + offset, mask=inside, other=0.0) + rest1 * grad
    v = decay2 * tl.load(v_ptr + offset, mask=inside, other=0.0) + rest2 * grad * grad
    weight = kept * tl.load(weight_ptr + offset, mask=inside, other=0.0)
    weight -= step_size * m / (tl.sqrt(v) / root_correction + eps)
    weight = tl.where(inside, weight, 0.0)
    tl.store(m_ptr + offset, m, mask=inside)
    tl.store(v_ptr + offset, v, mask=inside)
    tl.store(weight_ptr + offset, weight, mask=inside)
    if STORE_SHADOW:
        tl.store(shadow_ptr + offset, rounded(weight, shadow_ptr.dtype.element_ty), mask=inside)
    return weight


@triton.jit
def _normalise(weight_ptr, shadow_ptr, square, feature, d, BLOCK_D: tl.constexpr):
    """Scales a whole row to length one; ``square`` is the sum of its squares. A row of zeros stays."""
    scale = 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0))
    for column in range(0, d, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        offset = row_offset(feature, d) + columns
        weight = tl.load(weight_ptr + offset, mask=columns < d, other=0.0) * scale
        tl.store(weight_ptr + offset, weight, mask=columns < d)
        if shadow_ptr is not None:
            tl.store(shadow_ptr + offset, rounded(weight, shadow_ptr.dtype.element_ty), mask=columns < d)


@triton.jit(do_not_specialize=["step"])
def _adam(
    feature_ptr,  # [entries] int32, sorted
    ptr_ptr,  # [F + 1] int64
    token_ptr,
    value_ptr,
    left_ptr,
    left_stride,
    grad_ptr,
    right_ptr,
    right_stride,
    theta_ptr,
    dec_scratch_ptr,
    enc_scratch_ptr,
    sums_scratch_ptr,
    bias_ptr,  # [F] float32, with grad_ptr
    dtheta_ptr,  # [F] float32, with theta_ptr
    count_ptr,  # [F] int32, with value_ptr
    dec_weight_ptr,  # [F, D_out] float32, with value_ptr
    dec_m_ptr,
    dec_v_ptr,
    dec_shadow_ptr,  # [F, D_out] half precision, or None
    enc_weight_ptr,  # [F, D_in] float32, with grad_ptr
    enc_m_ptr,
    enc_v_ptr,
    enc_shadow_ptr,
    last_step_ptr,  # [F] int32: lazy rows; None: dense rows
    step,
    step_size,
    root_correction,
    eps,
    rest1,
    rest2,
    decay1,
    decay2,
    kept,
    log_decay1,
    log_decay2,
    log_kept,
    d_dec,
    d_enc,
    slices,  # slices of D per program: all of them where a row is normalised, else 1
    UNIT_DEC: tl.constexpr,
    UNIT_ENC: tl.constexpr,
    BY_ENTRY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    CUT: tl.constexpr,
):
    feature = feature_of_program(feature_ptr, BY_ENTRY)
    if feature < 0:
        return
    if last_step_ptr is not None:
        unused = tl.load(ptr_ptr + feature) == tl.load(ptr_ptr + feature + 1)
        if unused:
            return
        passed = tl.cast(step - tl.load(last_step_ptr + feature), tl.float32)
        decay1 = _power(decay1, log_decay1, passed)
        decay2 = _power(decay2, log_decay2, passed)
        kept = _power(kept, log_kept, passed)
    dec_square = tl.full([], 0.0, tl.float32)
    enc_square = tl.full([], 0.0, tl.float32)
    for index in range(tl.program_id(1) * slices, (tl.program_id(1) + 1) * slices):
        columns = index * BLOCK_D + tl.arange(0, BLOCK_D)
        dec, enc, bias, theta, count = feature_sums(
            feature,
            ptr_ptr,
            token_ptr,
            value_ptr,
            left_ptr,
            left_stride,
            grad_ptr,
            right_ptr,
            right_stride,
            theta_ptr,
            dec_scratch_ptr,
            enc_scratch_ptr,
            sums_scratch_ptr,
            d_dec,
            d_enc,
            columns,
            BLOCK_D,
            ROWS,
            CUT,
        )
        if value_ptr is not None:
            weight = _update(
                dec,
                dec_weight_ptr,
                dec_m_ptr,
                dec_v_ptr,
                dec_shadow_ptr,
                row_offset(feature, d_dec) + columns,
                columns < d_dec,
                step_size,
                root_correction,
                eps,
                rest1,
                rest2,
                decay1,
                decay2,
                kept,
                dec_shadow_ptr is not None and not UNIT_DEC,
            )
            dec_square += tl.sum(weight * weight, axis=0)
        if grad_ptr is not None:
            weight = _update(
                enc,
                enc_weight_ptr,
                enc_m_ptr,
                enc_v_ptr,
                enc_shadow_ptr,
                row_offset(feature, d_enc) + columns,
                columns < d_enc,
                step_size,
                root_correction,
                eps,
                rest1,
                rest2,
                decay1,
                decay2,
                kept,
                enc_shadow_ptr is not None and not UNIT_ENC,
            )
            enc_square += tl.sum(weight * weight, axis=0)
        if index == 0:
            if value_ptr is not None:
                tl.store(count_ptr + feature, count)
            if grad_ptr is not None:
                tl.store(bias_ptr + feature, bias)
            if theta_ptr is not None:
                tl.store(dtheta_ptr + feature, theta)
    if UNIT_DEC or UNIT_ENC:
        tl.debug_barrier()  # the row is read back below, perhaps by other threads than those that wrote it
    if UNIT_DEC:
        _normalise(dec_weight_ptr, dec_shadow_ptr, dec_square, feature, d_dec, BLOCK_D)
    if UNIT_ENC:
        _normalise(enc_weight_ptr, enc_shadow_ptr, enc_square, feature, d_enc, BLOCK_D)


def _pointers(state: RowState | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if state is None else (state.weight, state.m, state.v, state.shadow)


def launch_adam(
    order: FeatureOrder,
    terms: Terms,
    step: AdamStep,
    *,
    dec: RowState | None = None,
    enc: RowState | None = None,
    last_step: Tensor | None = None,
    config: KernelConfig | None = None,
) -> FeatureSums:
    """Sums the terms of every feature and updates the weight rows in place.

    Args:
        order: from :func:`fasttc.kernels._features.sort_entries`.
        terms: gradients to sum; values and left for ``dec``, grads and right for ``enc``.
        step: constants of this step.
        dec: W_dec and its state. enc: W_enc and its state.
        last_step: None (dense rows), or [F] int32, 0 at first, updated in place (lazy rows).
        config: launch parameters; the architecture's by default.

    Returns:
        The sums per feature: ``bias``, ``theta``, ``count``; the matrices are None.

    Raises:
        ValueError: terms of a matrix without its state, or a state without its terms.
    """
    for name, given, state in (("dec", terms.values, dec), ("enc", terms.grads, enc)):
        if (given is None) != (state is None):
            raise ValueError(
                f"{name}: expected the state of the matrix whose gradient is summed, and no other, got "
                f"{'a state without terms' if given is None else 'terms without a state'}"
            )
    device, n_features = order.entry.device, order.n_features
    config = config or configure(_SINGLE if terms.single else _HALF, device)
    widths = terms.widths
    asked = (terms.grads, torch.float32), (terms.thetas, torch.float32), (terms.values, torch.int32)
    vectors = [
        None if t is None else torch.zeros(n_features, dtype=dtype, device=device) for t, dtype in asked
    ]
    entries, slices = order.entry.shape[0], max(cdiv(max(widths), config["BLOCK_D"]), 1)
    by_entry = last_step is not None and entries < n_features
    programs = entries if by_entry else n_features
    unit_dec, unit_enc = (state is not None and state.unit_norm for state in (dec, enc))
    per_program = slices if unit_dec or unit_enc else 1
    if programs:
        with on_device(order.entry):
            _adam[(programs, slices // per_program)](
                *prepare(order, terms, config),
                *vectors,
                *_pointers(dec),
                *_pointers(enc),
                last_step,
                step.step,
                *step.scalars(),
                *widths,
                per_program,
                UNIT_DEC=unit_dec,
                UNIT_ENC=unit_enc,
                BY_ENTRY=by_entry,
                **config.options(),
            )
        if last_step is not None:
            last_step.index_fill_(0, order.feature.long(), step.step)
    return FeatureSums(None, None, *vectors)


def aot_cases(d: int) -> list[AotCase]:
    """Dense rows with a normalised decoder and a shadow, and lazy rows, for activations in each dtype."""
    names = _adam.arg_names
    floats = tuple(names[names.index("step_size") : names.index("d_dec")])
    weights = {f"{side}_{part}_ptr": "fp32" for side in ("dec", "enc") for part in ("weight", "m", "v")}
    vectors = {"bias_ptr": "fp32", "dtheta_ptr": "fp32", "count_ptr": "i32"}
    cases = []
    for dtype in DTYPES:
        even = aligned(d, dtype)
        strides = () if even else ("d_dec", "d_enc", "left_stride", "right_stride")
        shadow = None if dtype == "fp32" else dtype
        streams = {**STREAMS, "left_ptr": dtype, "right_ptr": dtype, "theta_ptr": "fp32"}
        shadows = {"dec_shadow_ptr": shadow, "enc_shadow_ptr": shadow}
        for name, lazy in (("dense rows, unit decoder", False), ("lazy rows", True)):
            cases.append(
                case(
                    f"adam {name} {dtype}",
                    _adam,
                    _SINGLE if dtype == "fp32" else _HALF,
                    {**streams, **vectors, **weights, **shadows, "last_step_ptr": "i32" if lazy else None},
                    odd=("step", "slices", *strides),
                    floats=floats,
                    constants={"UNIT_DEC": not lazy, "UNIT_ENC": False, "BY_ENTRY": lazy},
                    vector_loads=even,
                )
            )
    return cases
