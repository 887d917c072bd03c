"""Approximating a kernel so that its outputs change least: the norm of a second moment.

For inputs x with second moment G, approximating a kernel K by K̃ changes the outputs by
``E‖(K − K̃) x‖² = tr((K − K̃) G (K − K̃)ᵀ)``. Without data G is the identity, and this is the
squared Frobenius norm of the difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from tdecomp.linalg.svd import gram_matrix

# Added to the diagonal, as a share of the mean input power, so that the weights themselves decide
# in directions that the data never showed. Far below the precision of float32 inputs, and far above
# the round-off of float64.
_RIDGE = 1e-10
# A power below this is that of inputs that say nothing.
_LEAST = 1e-290
# The factor by which the ridge grows until a matrix is positive definite.
_RIDGE_GROWTH = 4.0
_WIDE = 512
_BLOCK_ROWS = 512  # of a large kernel that are multiplied at a time
_BLOCK_COLUMNS = 2048  # of a lookup's kernel, which has one for each of its rows


@dataclass(frozen=True)
class SecondMoment:
    """``G = E[x xᵀ]`` of a layer's inputs: a matrix, or for few samples the samples themselves.

    Inputs that are one-hot, as those of a lookup, have a diagonal one: how often each row is read.

    >>> moment = tdecomp.SecondMoment(rows=torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> moment.lost(torch.tensor([[1.0, 0.0]])), moment.lost(torch.tensor([[0.0, 1.0]]))
    (9.0, 1.0)

    A method's `fit_to` gets that of the patches that its kernel sees, flattened to ``fan_in``
    numbers: channels first, then the places of the kernel.

    Attributes
    ----------
    matrix : Tensor of shape (fan_in, fan_in), or None
        The second moment; exactly one of `matrix`, `rows` and `diagonal` is given.
    rows : Tensor of shape (samples, fan_in), or None
        Instead of the matrix; ``rows.T @ rows`` is the second moment.
    added : float
        To the diagonal of that of the rows.
    diagonal : Tensor of shape (fan_in,), or None
        Instead of the matrix, where all else is zero.

    Raises
    ------
    ValueError
        If not exactly one of `matrix`, `rows` and `diagonal` is given.
    """

    matrix: Tensor | None = None
    rows: Tensor | None = None
    added: float = 0.0
    diagonal: Tensor | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("matrix", "rows", "diagonal") if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"SecondMoment: expected one of matrix, rows and diagonal, got {got}")

    @property
    def _matrix(self) -> Tensor:
        assert self.matrix is not None
        return self.matrix

    @property
    def ridge(self) -> float:
        """The number that is added to the diagonal."""
        power = self.trace / self.fan_in
        # Round-off may leave inputs that never vary a power below 0; the least of floats has no
        # share that is one.
        return _RIDGE * (power if power > _LEAST else 1.0)

    @cached_property
    def trace(self) -> float:
        """The power of all inputs together."""
        if self.rows is not None:  # a square of each number would need as much memory again
            squares = torch.linalg.vector_norm(self.rows, dim=1).double().square()
            return float(squares.sum()) + self.added * self.fan_in
        if self.diagonal is not None:
            return float(self.diagonal.sum())
        return float(self._matrix.diagonal().sum())

    @property
    def fan_in(self) -> int:
        return self._held.shape[-1]

    @property
    def _held(self) -> Tensor:
        given = (self.rows, self.diagonal, self.matrix)
        return next(tensor for tensor in given if tensor is not None)

    def applied(self, kernel: Tensor) -> Tensor:
        """``K G``, for a kernel (out, fan_in)."""
        rows, given = self.rows, kernel
        kernel = kernel.to(self._held.dtype)
        if self.diagonal is not None:
            return (kernel * (self.diagonal + self.ridge)).to(given.dtype)
        product = kernel @ self._held if rows is None else (kernel @ rows.T) @ rows
        return (product + (self.added + self.ridge) * kernel).to(given.dtype)

    def between(self, kernel: Tensor) -> Tensor:
        """``K G Kᵀ`` (out, out): the second moment of the kernel's outputs."""
        return self.applied(kernel) @ kernel.T

    def solved(self, right: Tensor, ridge: float) -> Tensor:
        """``B (G + ridge · I)⁻¹`` for a matrix B (out, fan_in)."""
        given, right = right, right.to(self._held.dtype)
        if self.diagonal is not None:
            return (right / (self.diagonal + self.ridge + ridge)).to(given.dtype)
        if self.rows is None:
            ridge += self._definite_ridge
            return _solution(_ridged(self._matrix, ridge), right.T).T.to(given.dtype)
        # With fewer samples than inputs their Gram matrix is smaller (matrix inversion lemma).
        ridge += self.added + self.ridge
        inner = _solution(_ridged(self._gram, ridge), self.rows @ right.T)
        return ((right - (self.rows.T @ inner).T) / ridge).to(given.dtype)

    @cached_property
    def _gram(self) -> Tensor:
        assert self.rows is not None
        return self.rows @ self.rows.T

    def along(self, shape: Sequence[int], mode: int) -> Tensor:
        """The moment of one mode of inputs of this shape, summed over all places of the others."""
        before, size, after = prod(shape[:mode]), shape[mode], prod(shape[mode + 1 :])
        if self.rows is not None:
            unfolded = self.rows.reshape(-1, size, after).transpose(0, 1).flatten(1)
            return _ridged(unfolded @ unfolded.T, self.added * before * after)
        if self.diagonal is not None:
            return self.diagonal.reshape(before, size, after).sum(dim=(0, 2)).diag()
        blocks = self._matrix.reshape(before, size, after, before, size, after)
        return blocks.diagonal(dim1=0, dim2=3).diagonal(dim1=1, dim2=3).sum(dim=(2, 3))

    def normalised(self, dtype: torch.dtype) -> "SecondMoment":
        """The moment of inputs whose mean power is 1, with the ridge, in another precision."""
        power = self.trace / self.fan_in
        power = power if power > _LEAST else 1.0
        if self.rows is not None:
            return SecondMoment(None, (self.rows / power**0.5).to(dtype), self.added / power)
        if self.diagonal is not None:
            return SecondMoment(diagonal=(self.diagonal / power).to(dtype) + _RIDGE)
        return SecondMoment(matrix=_ridged((self._matrix / power).to(dtype), _RIDGE))

    def reordered(self, order: Callable[[Tensor, int], Tensor]) -> "SecondMoment":
        """The moment of the inputs in another order, which a callable gives one dimension."""
        if self.rows is not None:
            return replace(self, rows=order(self.rows, 1))
        if self.diagonal is not None:
            return replace(self, diagonal=order(self.diagonal, 0))
        return SecondMoment(matrix=order(order(self._matrix, 1), 0))

    def shrunk(self, share: float) -> "SecondMoment":
        """With a share of the mean power of the inputs added to the diagonal."""
        added = share * self.trace / self.fan_in
        if self.rows is not None:
            return replace(self, added=self.added + added)
        if self.diagonal is not None:
            return replace(self, diagonal=self.diagonal + added)
        return SecondMoment(matrix=_ridged(self._matrix, added))

    @cached_property
    def _definite_ridge(self) -> float:
        """Against the slightly negative eigenvalues of a matrix summed in float32."""
        ridge, most = self.ridge, float(self._matrix.abs().sum())  # no eigenvalue is larger
        # A matrix that is not finite never becomes definite; the fit then raises an error.
        while ridge < most and torch.linalg.cholesky_ex(_ridged(self._matrix, ridge)).info:
            ridge *= _RIDGE_GROWTH
        return ridge

    def lost(self, difference: Tensor) -> float:
        """``tr(D G Dᵀ)`` of a difference of kernels (out, fan_in), without the ridge.

        Of one in float32, which only large kernels have, no copy in float64 is made.
        """
        if difference.dtype == torch.float32 and self.diagonal is None:
            return self._lost_by_blocks(difference)
        if self.diagonal is not None:
            parts = (part.split(_BLOCK_COLUMNS, -1) for part in (difference, self.diagonal))
            pairs = zip(*parts, strict=True)
            return sum(float((d.to(self.diagonal.dtype).square() @ g).sum()) for d, g in pairs)
        difference = difference.to(self._held.dtype)
        if self.rows is not None:
            lost = (difference @ self.rows.T).square().sum()
            return float(lost + self.added * difference.square().sum())
        # Round-off can make the loss of an exact fit slightly negative.
        return max(float(((difference @ self._matrix) * difference).sum()), 0.0)

    def weighted_loss(self, difference: Tensor, importance: Tensor) -> float:
        """``tr(H D G Dᵀ)`` with the importance H (out, out) of the outputs, some rows at a time.

        Of H, which is symmetric, the entries above the diagonal are not read.
        """
        lost = 0.0
        for at in range(0, len(difference), _BLOCK_ROWS):
            applied = self.applied(difference[at : at + _BLOCK_ROWS].double())
            stop = at + len(applied)
            counts = importance[at:stop, :stop].tril(at)
            counts.diagonal(at).mul_(0.5)
            for some, others in zip(
                counts.split(_BLOCK_ROWS, dim=1), difference[:stop].split(_BLOCK_ROWS), strict=True
            ):
                lost += 2 * float(((some @ others.double()) * applied).sum())
        return lost

    def _lost_by_blocks(self, difference: Tensor) -> float:
        if self.rows is not None:
            # A sum of squares, of which float32 products of float32 numbers lose no digits.
            rows, lost = self.rows.to(difference.dtype), 0.0
            for block in difference.split(_BLOCK_ROWS):
                lost += float((block @ rows.T).double().square().sum())
                lost += self.added * float(block.double().square().sum())
            return lost
        # Half of the products of ``D G``: both matrices are symmetric.
        gram = gram_matrix(difference.T).mul_(self._matrix).tril_()
        return max(float(2 * gram.sum() - gram.diagonal().sum()), 0.0)


def is_wide(fan_in: int) -> bool:
    """Whether single precision saves time: with fewer inputs most of it goes to Python itself."""
    return fan_in >= _WIDE


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(ridge)
    return shifted


def _solution(definite: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, torch.linalg.cholesky(definite))
