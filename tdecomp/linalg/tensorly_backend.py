"""TensorLy on torch tensors: the only file that sets TensorLy's backend, and puts it back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tensorly
import tensorly.tenalg
import torch
from tensorly.backend.pytorch_backend import PyTorchBackend
from tensorly.tenalg.core_tenalg import CoreTenalgBackend
from torch import Tensor

from tdecomp.linalg.svd import svd


class _Mttkrp:
    """The unfolding along a mode times the Khatri-Rao product of the other factors.

    TensorLy's own version forms that product: 6 GB for the spatial modes of a 512×512×3×3 kernel at
    rank 1,000. Contracting the largest mode first never needs more than the kernel's entries,
    divided by that mode's size and multiplied by the rank. This is nearly all of the work, and is
    kept for the following modes of a sweep (Phan, Tichavský and Cichocki 2013, "Fast Alternating LS
    Algorithms for High Order CANDECOMP/PARAFAC").
    """

    def __init__(self) -> None:
        # The tensor, the factor and their product. Sweeps replace factors and never modify them.
        self._known: tuple[Tensor, Tensor, Tensor] | None = None
        # Reused for each product: allocating this much memory takes longer than the arithmetic.
        self._buffers: dict[str, Tensor] = {}

    def __call__(
        self, tensor: Tensor, cp_tensor: tuple[Tensor | None, list[Tensor]], mode: int
    ) -> Tensor:
        weights, factors = cp_tensor
        others = [m for m in range(tensor.dim()) if m != mode]
        first = max(others, key=lambda m: (self._knows(tensor, factors[m]), tensor.shape[m]))
        partial = self._contracted(tensor, factors[first], first)  # (..., R)
        left = [m for m in range(tensor.dim()) if m != first]
        for other in (m for m in others if m != first):
            position = left.index(other)
            shape = [1] * (partial.dim() - 1) + [partial.shape[-1]]
            shape[position] = tensor.shape[other]
            product = self._buffer(f"product of {partial.dim() - 1} modes", partial, partial.shape)
            torch.mul(partial, factors[other].reshape(shape), out=product)
            partial = product.sum(dim=position)
            left.remove(other)
        return partial if weights is None else partial * weights

    def _knows(self, tensor: Tensor, factor: Tensor) -> bool:
        known = self._known
        return known is not None and known[0] is tensor and known[1] is factor

    def _contracted(self, tensor: Tensor, factor: Tensor, mode: int) -> Tensor:
        if self._known is None or not self._knows(tensor, factor):
            moved = tensor.movedim(mode, -1)
            shape = (*moved.shape[:-1], factor.shape[1])
            product = self._buffer("contraction", tensor, shape)
            torch.mm(moved.reshape(-1, len(factor)), factor, out=product.view(-1, shape[-1]))
            self._known = tensor, factor, product
        return self._known[2]

    def _buffer(self, use: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        known = self._buffers.get(use)
        if known is None or known.shape != torch.Size(shape) or known.dtype != like.dtype:
            known = self._buffers[use] = like.new_empty(tuple(shape))
        return known


# TensorLy's own backend with one function replaced.
_BACKEND = PyTorchBackend()
_BACKEND.svd = svd


@contextmanager
def torch_backend() -> Iterator[None]:
    """TensorLy on torch tensors, within a `with` block and in this thread only."""
    algebra = CoreTenalgBackend()
    algebra.unfolding_dot_khatri_rao = _Mttkrp()
    with (
        tensorly.backend_context(_BACKEND, local_threadsafe=True),
        tensorly.tenalg.backend_context(algebra, local_threadsafe=True),
    ):
        yield


@torch_backend()
def unfold(tensor: Tensor, mode: int) -> Tensor:
    """TensorLy's mode-`mode` unfolding: (shape[mode], everything else)."""
    unfolded: Tensor = tensorly.unfold(tensor, mode)
    return unfolded


@torch_backend()
def mode_products(tensor: Tensor, matrices: Sequence[Tensor], modes: Sequence[int]) -> Tensor:
    """TensorLy's `multi_mode_dot`: each of `modes` multiplied by its matrix."""
    product: Tensor = tensorly.tenalg.multi_mode_dot(tensor, list(matrices), modes=list(modes))
    return product
