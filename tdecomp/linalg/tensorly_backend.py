"""TensorLy on torch tensors: the only file that sets TensorLy's backend, and puts it back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tensorly
import tensorly.tenalg
from tensorly.backend.pytorch_backend import PyTorchBackend
from torch import Tensor

from tdecomp.linalg.svd import svd

# TensorLy's own backend with one function replaced.
_BACKEND = PyTorchBackend()
_BACKEND.svd = svd


@contextmanager
def torch_backend() -> Iterator[None]:
    """TensorLy on torch tensors, within a `with` block and in this thread only."""
    with tensorly.backend_context(_BACKEND, local_threadsafe=True):
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
