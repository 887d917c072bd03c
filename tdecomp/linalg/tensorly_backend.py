"""TensorLy on torch tensors: the only file that sets TensorLy's backend, and puts it back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tensorly
import tensorly.tenalg
from tensorly.backend.pytorch_backend import PyTorchBackend
from tensorly.decomposition import tensor_train_matrix
from tensorly.tt_matrix import tt_matrix_to_matrix
from torch import Tensor

from tdecomp.linalg.randomized_svd import randomized_vectors
from tdecomp.linalg.svd import Sketch, svd, truncated_svd

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


@torch_backend()
def tt_svd(
    tensor: Tensor, rank: Sequence[int], *, randomized: Sketch = randomized_vectors
) -> list[Tensor]:
    """TensorLy's `tensor_train_matrix` of a tensor (*rows, *columns).

    Core k is (rank, rows, columns, rank); a rank larger than the tensor has there is made smaller.
    """

    def triplets(matrix: Tensor, n_eigenvecs: int, **_: object) -> tuple[Tensor, Tensor, Tensor]:
        return truncated_svd(matrix, n_eigenvecs, randomized=randomized)

    return list(tensor_train_matrix(tensor, [1, *rank, 1], svd=triplets).factors)


@torch_backend()
def tt_matrix(cores: Sequence[Tensor]) -> Tensor:
    """TensorLy's `tt_matrix_to_matrix`: the matrix that the cores of a tensor train stand for."""
    matrix: Tensor = tt_matrix_to_matrix(list(cores))
    return matrix
