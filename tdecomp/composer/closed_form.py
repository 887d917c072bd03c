"""The rank-k operator whose outputs on given inputs are nearest to a target, in closed form.

The best approximation of an operator's own outputs projects them on their k leading principal
directions, after subtracting their mean where there is a bias (Zhang et al. 2016, "Accelerating
Very Deep Convolutional Networks for Classification and Detection", equations 4 to 6). It takes one
pass of the operator and the second moment of its outputs; the patches of a convolution are never
formed. Another target is regressed on the inputs first: reduced rank regression (Izenman 1975,
"Reduced-rank regression for the multivariate linear model").
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdecomp.linalg.leading_outputs import leading_outputs
from tdecomp.linalg.second_moment import SecondMoment

# Multiplies the inputs by a matrix (fan_in, m).
Times = Callable[[Tensor], Tensor]
# Samples that are converted to float64 at a time.
_CHUNK = 8192
# The weights' share of the outputs' power. It decides where the data leaves several solutions.
_WEIGHTS_SHARE = 1e-10


@dataclass(frozen=True)
class Operator:
    """``x ↦ x first second + bias``."""

    first: Tensor  # (fan_in, latent)
    second: Tensor | None  # (latent, out), None for the identity
    bias: Tensor | None  # (out,)

    @property
    def product(self) -> Tensor:
        return self.first if self.second is None else self.first @ self.second

    @property
    def full(self) -> int:
        """The rank from which on one matrix is no larger than two."""
        last = self.first if self.second is None else self.second
        return min(len(self.first), last.shape[1])

    def reduces(self, k: int) -> bool:
        """Whether rank k is below the present one, so that the operator has to be approximated."""
        return k < min(self.full, self.first.shape[1])

    def without_bias(self, dtype: torch.dtype) -> "Operator":
        """Both matrices in another dtype."""
        second = None if self.second is None else self.second.to(dtype).contiguous()
        return Operator(self.first.to(dtype).contiguous(), second, None)

    def outputs(self, latent: Tensor) -> Tensor:
        """The outputs (samples, out), where ``x first`` is known."""
        outputs = latent if self.second is None else latent @ self.second
        return outputs if self.bias is None else outputs + self.bias


def solve(
    times: Times, operator: Operator, k: int, dtype: torch.dtype, target: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, int, float]:
    """An operator of rank k, or one matrix where k is not below its sizes, rounded to `dtype`.

    Its three parts, then the rank and the error as in `LowRankSolution`. `target` (samples, out)
    is the operator's own outputs, plus a part that no operator gives.
    """
    reduced = operator.reduces(k)
    if reduced and operator.second is None and operator.first.shape[1] > len(operator.first):
        # The outputs lie in the span of fan_in directions.
        basis, triangle = torch.linalg.qr(operator.first.T)  # (out, fan_in), (fan_in, fan_in)
        operator = replace(operator, first=triangle.T, second=basis.T)
    latent = times(operator.first)
    outputs = operator.outputs(latent)
    if not bool(torch.isfinite(outputs).all()):
        remedy = "scale them down, or pass them in torch.float64"
        raise ValueError(f"products of X, Wa, Wb leave the range of {outputs.dtype}; {remedy}")
    target = outputs if target is None else target
    if reduced:
        operator = _reduced(operator, latent, k)
    elif k >= operator.full:
        operator = replace(operator, first=operator.product, second=None)
    del latent, outputs
    rounded = operator.without_bias(dtype)
    wide = rounded.without_bias(target.dtype)
    error = target - wide.outputs(times(wide.first))
    bias = operator.bias
    if bias is not None:
        # The mean error is the bias to add; a bias that already fits is kept bit for bit.
        bias = error.mean(dim=0, dtype=torch.float64) if reduced else bias
        error -= bias.to(target)
        bias = bias.to(dtype).contiguous()
    nmse = _mean_square(error) / _power(target)
    return rounded.first, rounded.second, bias, k if reduced else -1, nmse


def _reduced(operator: Operator, latent: Tensor, k: int) -> Operator:
    """The operator, then a projection on the k leading directions of its outputs."""
    first, second = operator.first, operator.second
    moment = _product(latent, latent, centred=operator.bias is not None)  # (latent, latent)
    weights = (first.T @ first).double()
    power, total = float(moment.trace()), float(weights.trace())
    # If the outputs are all zero, the weights alone decide.
    moment += weights * (_WEIGHTS_SHARE * power / (total or 1.0) if power else 1.0)
    kernel = torch.eye(len(moment)).double() if second is None else second.T.double()
    basis = leading_outputs(kernel, SecondMoment(matrix=moment), k).to(first)  # (out, k)
    wa = first @ (basis if second is None else second @ basis)  # (fan_in, k)
    # Each direction has the same norm in both, so that neither's gradients dwarf the other's.
    roots = wa.norm(dim=0).sqrt()
    roots = torch.where(roots > 0, roots, 1.0)
    return replace(operator, first=wa / roots, second=roots[:, None] * basis.T)


def corrected(operator: Operator, x: Tensor, target: Tensor, rounding: float) -> Operator:
    """Of all operators whose outputs are nearest to a target, the one nearest to this operator.

    It is this operator where its outputs for `x` (samples, fan_in) differ from `target`
    (samples, out), of the relative precision `rounding`, by rounding errors only.
    """
    missing = target - operator.outputs(x @ operator.first)
    if _mean_square(missing) <= (8 * rounding) ** 2 * _mean_square(target):
        return operator
    centred = operator.bias is not None
    mean = x.mean(dim=0, dtype=torch.float64)
    # A Gram matrix in float64 still resolves the singular values of float32 inputs.
    precision = torch.finfo(torch.float64).eps * max(x.shape)
    precision = max(precision, (8 * torch.finfo(x.dtype).eps) ** 2)
    if len(x) < x.shape[1]:
        rows = x.double() - mean * centred
        change = rows.T @ (_pseudo_inverse(rows @ rows.T, precision) @ missing.double())
    else:
        gram = _product(x, x, centred)
        change = _pseudo_inverse(gram, precision) @ _product(x, missing, centred)
    bias = operator.bias
    if bias is not None:
        bias = bias + (missing.mean(dim=0, dtype=torch.float64) - mean @ change).to(bias)
    return Operator(operator.product + change.to(x), None, bias)


def _pseudo_inverse(gram: Tensor, precision: float) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    kept = values > precision * values[-1]
    inverse: Tensor = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    return inverse


def _product(a: Tensor, b: Tensor, centred: bool) -> Tensor:
    """``a.T @ b`` in float64, in slices of samples; `centred` subtracts both means first."""
    mean_a, mean_b = (part.mean(dim=0, dtype=torch.float64) * centred for part in (a, b))
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for left, right in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True):
        total.addmm_((left.double() - mean_a).T, right.double() - mean_b)
    return total


def _power(target: Tensor) -> float:
    """The variance of all entries, or their mean square where they are all equal."""
    freedom = target.numel() / max(target.numel() - 1, 1)
    return _mean_square(target - target.mean()) * freedom or _mean_square(target) or 1.0


def _mean_square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2 / values.numel()
