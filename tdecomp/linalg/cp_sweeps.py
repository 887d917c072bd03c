"""Alternating least squares for the factors of CP, as TensorLy makes it, in a tenth of the calls.

Kolda and Bader 2009, "Tensor Decompositions and Applications", section 3.4, with the line search of
Bro 1998, "Multi-way Analysis in the Food Industry", section 5.4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tdecomp.linalg.features import khatri_rao

_PLAIN = 5  # sweeps before the first line search
_FAILURES = 4  # of the line search, after which it goes less far


def cp_sweeps(
    tensor: Tensor, start: Sequence[Tensor], most: int, *, tol: float, ridge: float
) -> tuple[list[Tensor], list[float]]:
    """The factors (size, R) of each mode after sweeps from a start, and the errors on the way.

    It ends where the relative error changes by less than `tol` in a sweep. After a few sweeps
    every other one is followed by a step further in its direction, where that is nearer.
    """
    factors, before, errors = [*start], [*start], list[float]()
    grams = [factor.T @ factor for factor in factors]
    products, norm = _Products(tensor), float(tensor.norm())
    root, failures = 2.0, 0
    for sweep in range(most):
        if sweep % 2 == 0:
            before = [*factors]
        for mode in range(tensor.dim()):
            normal = torch.stack(grams[:mode] + grams[mode + 1 :]).prod(dim=0)
            normal.diagonal().add_(ridge)
            product = products(factors, mode)
            factors[mode] = torch.linalg.solve(normal, product.T).T
            grams[mode] = factors[mode].T @ factors[mode]
        if sweep % 2 == 0 and sweep > _PLAIN:
            jump = sweep ** (1 / root)
            further = [a + (b - a) * jump for a, b in zip(before, factors, strict=True)]
            if _distance(tensor, further) / norm < errors[-1]:
                factors, failures = further, 0
                grams = [factor.T @ factor for factor in factors]
            else:
                failures += 1
                if failures == _FAILURES:
                    root, failures = root + 1.0, 0
            continue
        square = norm**2 + float(torch.stack(grams).prod(dim=0).sum())
        square -= 2 * float((product * factors[-1]).sum())
        errors.append(abs(square) ** 0.5 / norm)
        if len(errors) > 1 and abs(errors[-2] - errors[-1]) < tol:
            break
    return factors, errors


def _distance(tensor: Tensor, factors: Sequence[Tensor]) -> float:
    return float((tensor.flatten(1) - factors[0] @ khatri_rao(factors[1:]).T).norm())


class _Products:
    """The unfolding along a mode times the Khatri-Rao product of the other factors.

    Forming that product would take 6 GB for the spatial modes of a 512×512×3×3 kernel at
    rank 1,000. Contracting the largest mode first never needs more than the kernel's entries,
    divided by that mode's size and multiplied by the rank. This is nearly all of the work, and is
    kept for the following modes of a sweep (Phan, Tichavský and Cichocki 2013, "Fast Alternating LS
    Algorithms for High Order CANDECOMP/PARAFAC").
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        # A factor and its product with the tensor. Sweeps replace factors and never modify them.
        self._known: tuple[Tensor, Tensor] | None = None
        # Reused for each product: allocating this much memory takes longer than the arithmetic.
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, factors: Sequence[Tensor], mode: int) -> Tensor:
        sizes = self._tensor.shape
        others = [m for m in range(len(sizes)) if m != mode]
        first = max(others, key=lambda m: (self._knows(factors[m]), sizes[m]))
        partial = self._contracted(factors[first], first)  # (..., R)
        left = [m for m in range(len(sizes)) if m != first]
        for other in (m for m in others if m != first):
            position = left.index(other)
            shape = [1] * (partial.dim() - 1) + [partial.shape[-1]]
            shape[position] = sizes[other]
            product = self._buffer(f"product of {partial.dim() - 1} modes", partial.shape)
            torch.mul(partial, factors[other].reshape(shape), out=product)
            partial = product.sum(dim=position)
            left.remove(other)
        return partial

    def _knows(self, factor: Tensor) -> bool:
        return self._known is not None and self._known[0] is factor

    def _contracted(self, factor: Tensor, mode: int) -> Tensor:
        if self._known is None or not self._knows(factor):
            moved = self._tensor.movedim(mode, -1)
            product = self._buffer("contraction", (*moved.shape[:-1], factor.shape[1]))
            flat = moved.reshape(-1, len(factor))
            torch.mm(flat, factor, out=product.view(len(flat), -1))
            self._known = factor, product
        return self._known[1]

    def _buffer(self, use: str, shape: Sequence[int]) -> Tensor:
        known = self._buffers.get(use)
        if known is None or known.shape != torch.Size(shape):
            known = self._buffers[use] = self._tensor.new_empty(tuple(shape))
        return known
