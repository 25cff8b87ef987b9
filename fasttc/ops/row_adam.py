"""RowAdam: Adam on both weight matrices of a transcoder, straight from its activations and its error.

On a GPU the update happens inside the sums over the tokens of each feature (``kernels/adam.py``): the gradient
matrices [F, D] never exist, which saves their memory and 8 of 34 bytes of traffic per parameter. The price: nothing
that needs a whole gradient first (clipping by a global norm, accumulation over batches) fits in between.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fasttc.ops import _triton
from fasttc.ops._dispatch import choose
from fasttc.ops._validate import check_last_dim, check_matrix, check_same_device
from fasttc.ops.acts import SparseActs
from fasttc.ops.decode import decode
from fasttc.ops.segment import segment


@dataclass(frozen=True)
class FeatureReport:
    """What a step leaves to be used elsewhere.

    Attributes:
        grad_b_enc: [F] float32, the gradient of the encoder's bias.
        counts: [F] int32, on how many tokens of the batch each feature was active (value not zero).
    """

    grad_b_enc: Tensor
    counts: Tensor


class RowAdam:
    """AdamW (decoupled weight decay) on W_enc [F, D] and W_dec [F, D_out], updated in place.

    Args:
        W_enc, W_dec: float32, contiguous; the step changes them in place.
        betas, eps, weight_decay: of Adam.
        unit_norm: scale the rows of W_dec to length one after every update.
        lazy: touch only the rows of features that occur in the batch. When a row is touched again, Δ steps after
            the last time, its moments decay by ``beta^Δ`` and its weights by ``(1 - lr·weight_decay)^Δ`` at once;
            the moves that Adam makes on momentum alone are left out, so results differ from those of dense Adam.
            Worth it where most features are silent in a batch (from about 10^5 features).
        shadow: None, or a half-precision dtype: ``shadow_enc`` and ``shadow_dec`` then hold rounded copies for the
            forward pass, written along with the weights.

    Attributes:
        state: all tensors besides the weights by name ("enc.m", "enc.v", "dec.m", "dec.v", and "last_step" if lazy).
        steps: updates done so far; set it along with ``state`` to resume.
    """

    def __init__(
        self,
        W_enc: Tensor,
        W_dec: Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        unit_norm: bool = False,
        lazy: bool = False,
        shadow: torch.dtype | None = None,
    ) -> None:
        for name, weight in (("W_enc", W_enc), ("W_dec", W_dec)):
            check_matrix(name, weight)
            if weight.dtype != torch.float32 or not weight.is_contiguous():
                raise ValueError(f"{name}: expected contiguous float32, got {weight.dtype} {weight.stride()}")
        if W_enc.shape[0] != W_dec.shape[0]:
            raise ValueError(f"W_dec: expected {W_enc.shape[0]} rows as W_enc, got {W_dec.shape[0]}")
        check_same_device(W_enc=W_enc, W_dec=W_dec)
        self.W_enc, self.W_dec = W_enc.detach(), W_dec.detach()
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.unit_norm, self.steps = unit_norm, 0
        self.state = {
            f"{name}.{moment}": torch.zeros_like(weight)
            for name, weight in (("enc", self.W_enc), ("dec", self.W_dec))
            for moment in ("m", "v")
        }
        if lazy:
            self.state["last_step"] = torch.zeros(len(W_enc), dtype=torch.int32, device=W_enc.device)
        self.shadow_enc, self.shadow_dec = (
            None if shadow is None else weight.to(shadow) for weight in (self.W_enc, self.W_dec)
        )

    @torch.no_grad()
    def step(
        self,
        acts: SparseActs,
        error: Tensor,
        x: Tensor,
        *,
        lr: float,
        weight: float = 1.0,
        relu: bool = True,
        impl: str = "auto",
    ) -> FeatureReport:
        """One update for the loss whose gradient with respect to the decoded output is ``weight · error``.

        Args:
            acts: what the encoder gave for x.
            error: [*acts.shape, D_out], such as ``residual(acts, W_dec, y, b_dec)[0]``.
            x: [*acts.shape, D]. Rows of error and x are gathered: in half precision half the bytes move.
            lr: learning rate of this step.
            weight: factor of the loss; for a mean squared error over N tokens 2 / N.
            relu: whether the activations passed a ReLU or a threshold, so that zeros carry no gradient to W_enc.
            impl: "auto", "reference", "torch" or "triton". A named one runs or raises.

        Returns:
            The bias gradient and firing counts. The step is bitwise the same from run to run with impl="triton" and,
            on the CPU, with the others.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, with what was expected and what came.
        """
        error, x = self._check(acts, error, x)
        decisive = _triton.unreadable(acts.values, error, x)
        choice = choose(impl, "row_adam", x if decisive is None else decisive)
        self.steps += 1
        update = self._fused if choice.impl == "triton" else self._unfused
        return update(acts, error, x, lr, weight, relu, choice.impl)

    def _check(self, acts: SparseActs, error: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(acts, SparseActs):
            raise TypeError(f"acts: expected SparseActs, got {type(acts).__name__}")
        if acts.n_features != len(self.W_enc):
            raise ValueError(f"acts: expected {len(self.W_enc)} features, got {acts.n_features}")
        for name, rows, like in (("error", error, self.W_dec), ("x", x, self.W_enc)):
            check_last_dim(name, rows, like.shape[1])
            if tuple(rows.shape[:-1]) != acts.shape:
                raise ValueError(
                    f"{name}: expected shape {[*acts.shape, like.shape[1]]}, got {list(rows.shape)}"
                )
        check_same_device(W_enc=self.W_enc, values=acts.values, error=error, x=x)
        return error.reshape(-1, self.W_dec.shape[1]), x.reshape(-1, self.W_enc.shape[1])

    def _pre_activation_grads(self, acts: SparseActs, products: Tensor, weight: float, relu: bool) -> Tensor:
        return weight * products * (acts.values != 0) if relu else weight * products

    def _fused(
        self, acts: SparseActs, error: Tensor, x: Tensor, lr: float, weight: float, relu: bool, impl: str
    ) -> FeatureReport:
        from fasttc.kernels._features import Terms, sort_entries
        from fasttc.kernels.adam import AdamStep, RowState, launch_adam

        table = self.W_dec if self.shadow_dec is None else self.shadow_dec
        products = _triton.sddmm(error, table, acts.indices, acts.row_ptr)
        grads = self._pre_activation_grads(acts, products, weight, relu)
        terms = Terms(acts.values * weight, error.contiguous(), grads, x.contiguous())
        m_enc, v_enc, m_dec, v_dec = (self.state[name] for name in ("enc.m", "enc.v", "dec.m", "dec.v"))
        sums = launch_adam(
            sort_entries(acts.indices.contiguous(), acts.row_ptr, acts.n_features),
            terms,
            AdamStep(self.steps, lr, *self.betas, self.eps, self.weight_decay),
            dec=RowState(self.W_dec, m_dec, v_dec, self.shadow_dec, self.unit_norm),
            enc=RowState(self.W_enc, m_enc, v_enc, self.shadow_enc),
            last_step=self.state.get("last_step"),
        )
        assert sums.bias is not None, "launch_adam returns the sums of the gradients"
        assert sums.count is not None, "and the counts of the values"
        return FeatureReport(sums.bias, sums.count)

    def _unfused(
        self, acts: SparseActs, error: Tensor, x: Tensor, lr: float, weight: float, relu: bool, impl: str
    ) -> FeatureReport:
        """The same by PyTorch, with gradient matrices: the definition of what the fused step computes."""
        table = self.W_dec if self.shadow_dec is None else self.shadow_dec
        flat = replace(acts, shape=(acts.n_tokens,))
        with torch.enable_grad():
            values = acts.values.detach().requires_grad_()
            decoded = decode(replace(flat, values=values), table, impl=impl)
            (products,) = torch.autograd.grad(decoded, values, error.to(decoded.dtype))
        grads = self._pre_activation_grads(acts, products, weight, relu)
        used = torch.zeros(acts.n_features, dtype=torch.int32, device=x.device)
        counts = used.index_add(0, acts.indices.reshape(-1).long(), (acts.values != 0).int().reshape(-1))
        touched = slice(None)
        if "last_step" in self.state:
            used[acts.indices.reshape(-1).long()] = 1
            touched = used.nonzero()[:, 0]
        for name, weights, source, master, copy in (
            ("dec", acts.values * weight, error, self.W_dec, self.shadow_dec),
            ("enc", grads, x, self.W_enc, self.shadow_enc),
        ):
            gradient = segment(replace(flat, values=weights), source, impl=impl)
            self._update(name, master, gradient, touched, lr)
            if copy is not None:
                copy[touched] = master[touched].to(copy.dtype)
        if "last_step" in self.state:
            self.state["last_step"][touched] = self.steps
        bias = torch.zeros(acts.n_features, device=x.device)
        return FeatureReport(
            bias.index_add(0, acts.indices.reshape(-1).long(), grads.float().reshape(-1)), counts
        )

    def _update(
        self, name: str, master: Tensor, gradient: Tensor, touched: Tensor | slice, lr: float
    ) -> None:
        (beta1, beta2), t, passed = self.betas, self.steps, 1
        if "last_step" in self.state:
            passed = (t - self.state["last_step"][touched, None]).float()
        whole = (self.state[f"{name}.m"], self.state[f"{name}.v"], master)
        m, v, rows = (tensor[touched] for tensor in whole)  # views, or copies of the touched rows
        grad = gradient[touched].float()
        m.mul_(beta1**passed).add_(grad, alpha=1 - beta1)
        v.mul_(beta2**passed).addcmul_(grad, grad, value=1 - beta2)
        denominator = v.sqrt().div_((1 - beta2**t) ** 0.5).add_(self.eps)
        rows.mul_((1 - lr * self.weight_decay) ** passed)
        rows.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))
        if self.unit_norm and name == "dec":
            norm = rows.norm(dim=1, keepdim=True)
            rows.div_(torch.where(norm > 0, norm, 1.0))
        if isinstance(touched, Tensor):
            for tensor, changed in zip(whole, (m, v, rows), strict=True):
                tensor[touched] = changed
