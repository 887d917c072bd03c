"""The result of a fit: the factors of one kernel, and those of a layer, group by group."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.second_moment import SecondMoment


class Factors(ABC):
    """The factors of one dense kernel: a frozen dataclass of tensors.

    >>> kernel = torch.ones(8, 4, 3, 3)
    >>> factors = tdecomp.LowRank().fit(kernel, 1)
    >>> [tuple(weight.shape) for weight in factors.stage_weights()]
    [(1, 4, 3, 3), (8, 1, 1, 1)]
    >>> torch.allclose(factors.to_kernel(), kernel)
    True
    """

    @abstractmethod
    def to_kernel(self) -> Tensor:
        """Multiply the factors back to a kernel of shape (out, in, *kernel)."""

    @abstractmethod
    def stage_weights(self) -> tuple[Any, ...]:
        """One weight (out, in / groups, *kernel) for each stage of the chain.

        A stage of the method's own may have a tuple of tensors; its layers have no groups.
        """

    @abstractmethod
    def scaled(self, scale: float) -> Self:
        """The factors of `scale` times the kernel."""

    def balanced(self) -> Self:
        """The same kernel, its norm shared out where a fit leaves it in one of the factors."""
        return self

    def squared_norm(self) -> Tensor:
        """The squared Frobenius norm of the kernel; `factor_decay` takes gradients through it.

        A method overrides this where it needs no kernel, such as from small Gram matrices.
        """
        return self.to_kernel().square().sum()

    def component_norms(self) -> float | None:
        """The sum of the norms of the terms that add up to the kernel; None for other methods.

        If it is far above the kernel's norm the terms cancel each other, and rounding or
        fine-tuning destroys the sum.
        """
        return None

    def to(self, dtype: torch.dtype) -> Self:
        """Every tensor in `dtype`."""
        assert is_dataclass(self)
        return replace(self, **{f.name: _cast(getattr(self, f.name), dtype) for f in fields(self)})


@dataclass(frozen=True)
class Factorization:
    """The factors of a whole layer, group by group."""

    spec: LayerSpec
    groups: tuple[Factors, ...]

    def to_kernel(self) -> Tensor:
        """The kernel that the factors stand for, in the layer's own layout."""
        kernels = [factors.to_kernel() for factors in self.groups]
        return self.spec.from_forward_layout(_joined(kernels))

    def stage_weights(self) -> tuple[Any, ...]:
        """One weight (out, in / groups, *kernel) for each stage, all groups together."""
        per_group = (factors.stage_weights() for factors in self.groups)
        return tuple(_joined(weights) for weights in zip(*per_group, strict=True))

    def component_norms(self) -> float | None:
        """The sum over all groups, or None; see `Factors.component_norms`."""
        norms = [factors.component_norms() for factors in self.groups]
        return None if norms[0] is None else sum(norm or 0.0 for norm in norms)

    def to(self, dtype: torch.dtype) -> "Factorization":
        return replace(self, groups=tuple(factors.to(dtype) for factors in self.groups))


def better(kernel: Tensor, moment: SecondMoment, fitted: Factors, start: Factors) -> Factors:
    """The factors that lose less of the outputs; the start if `fitted` is not finite."""
    matrix = kernel.flatten(1)
    lost = [moment.lost(matrix - factors.to_kernel().flatten(1)) for factors in (fitted, start)]
    return fitted if lost[0] <= lost[1] else start


def squared_norm_of_product(left: Tensor, right: Tensor) -> Tensor:
    """``‖left @ right‖²`` from the Gram matrices of the side that both share."""
    return ((left.T @ left) * (right @ right.T)).sum()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) else value


def _joined(tensors: Sequence[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
