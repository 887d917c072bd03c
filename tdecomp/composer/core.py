"""One linear operator factorized into two, on given inputs: Composer's functions and result."""

import math
import numbers
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tdecomp.composer.closed_form import Operator, corrected, solve
from tdecomp.runtime.torch_state import full_precision


@dataclass(eq=False)
class LowRankSolution:
    """The replacement of a linear operator: ``Wa`` first, then ``Wb`` and the bias.

    >>> factorize_matrix(torch.eye(8), torch.eye(8), torch.eye(8), rank=2).rank
    2

    Attributes
    ----------
    Wa : Tensor
        A matrix (fan_in, rank), or a kernel (rank, in_channels, kh, kw).
    Wb : Tensor or None
        (rank, out), or (out_channels, rank, 1, 1); None where one matrix is no larger than two.
    bias : Tensor or None, shape (out,)
        Added after the last factor; None where no bias was given.
    rank : int
        The size between the two, -1 where nothing was factorized.
    nmse : float
        The mean squared error of the outputs over the variance of all entries of the target (over
        their mean square, if they do not vary): 0 for no error, 1 for no better than a constant.
    """

    Wa: Tensor | None = None
    Wb: Tensor | None = None
    bias: Tensor | None = None
    rank: int = -1
    nmse: float = 0.0


def factorize_matrix(
    X: Tensor,
    Y: Tensor,
    Wa: Tensor,
    Wb: Tensor | None = None,
    bias: Tensor | None = None,
    rank: int | float = 0.25,
    n_iters: int = 3,
) -> LowRankSolution:
    """The factors of a given rank, and their bias, that minimise ``‖Y − (X Wa Wb + bias)‖``.

    >>> X, W = torch.randn(100, 16), torch.randn(16, 32)
    >>> solution = factorize_matrix(X, X @ W, W, rank=4)
    >>> solution.Wa.shape, solution.Wb.shape
    (torch.Size([16, 4]), torch.Size([4, 32]))

    Parameters
    ----------
    X, Y : Tensor, shapes (N, D) and (N, M)
        Inputs, and the wanted outputs: usually ``X @ Wa + bias`` or ``X @ Wa @ Wb + bias``.
    Wa, Wb : Tensor, shapes (D, M) and none, or (D, d) and (d, M)
        If `Wb` is given, the matrix is ``Wa @ Wb``, whose rank is to be reduced further.
    bias : Tensor, shape (M,), optional
        A bias is fitted only if one is given.
    rank : int or float
        The columns of the new `Wa`; below 1 a fraction of D, at most the current rank, at least 1.
    n_iters : int
        Not used (Composer has it): the optimum is reached at once.

    Returns
    -------
    LowRankSolution
        In the dtype and on the device of `Wa`. For a rank of D, M or more it has one matrix and
        the rank −1; for one of d or more, the given factors and the rank −1. Among equally good
        solutions it is close to the given weights, also in directions that `X` never shows.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, there are no samples, values are not finite floating point numbers, or
        the rank is invalid.
    """
    del n_iters
    return factorize_rows(X, Y, Wa, Wb, bias, rank)


def factorize_rows(
    X: Tensor, Y: Tensor | None, Wa: Tensor, Wb: Tensor | None, bias: Tensor | None, rank: float
) -> LowRankSolution:
    """`factorize_matrix`; without a `Y` the wanted outputs are the present ones."""
    first = "D M" if Wb is None else "D d"
    wide = _widened(X=(X, "N D"), Y=(Y, "N M"), Wa=(Wa, first), Wb=(Wb, "d M"), bias=(bias, "M"))
    k = resolve_size("rank", rank, X.shape[1])
    if rank < 1:
        k = min(k, Wa.shape[1])
    with full_precision(Wa.device):
        x, operator = wide["X"], Operator(wide["Wa"], wide.get("Wb"), wide.get("bias"))
        if Y is not None and (operator.reduces(k) or k >= operator.full):
            rounding = max(torch.finfo(tensor.dtype).eps for tensor in (X, Y, Wa))
            operator = corrected(operator, x, wide["Y"], rounding)
        return LowRankSolution(*solve(x.matmul, operator, k, Wa.dtype, wide.get("Y")))


def factorize_conv2d(
    X: Tensor,
    Wa: Tensor,
    Wb: Tensor | None = None,
    rank: int | float = 0.25,
    biasA: Tensor | None = None,
    biasB: Tensor | None = None,
    n_iters: int = 3,
    **conv2d_kwargs: Any,
) -> LowRankSolution:
    """A K×K convolution to few channels and a 1×1 one that together change the outputs least.

    >>> X, W = torch.randn(4, 16, 8, 8), torch.randn(32, 16, 3, 3)
    >>> solution = factorize_conv2d(X, W, rank=4, padding=1, stride=2)
    >>> solution.Wa.shape, solution.Wb.shape
    (torch.Size([4, 16, 3, 3]), torch.Size([32, 4, 1, 1]))

    Parameters
    ----------
    X : Tensor, shape (N, in_channels, H, W) or (in_channels, H, W)
        Inputs; the outputs follow from the weights.
    Wa : Tensor, shape (out_channels, in_channels, kh, kw), or (latent, …) with `Wb`
        The kernel of the convolution, or of its first layer.
    Wb : Tensor, shape (out_channels, latent, 1, 1), optional
        If given, the convolution is `Wa` and then `Wb`, whose latent size is to be reduced.
    rank : int or float
        The output channels of the new `Wa`; below 1 a fraction of the smaller of in_channels and
        out_channels, at least 1.
    biasA, biasB : Tensor, optional
        Added to what `Wa` and `Wb` give. A bias is fitted only if one is given.
    n_iters : int
        As for `factorize_matrix`.
    **conv2d_kwargs
        `stride`, `padding`, `dilation`, `padding_mode` of the convolution, as for `nn.Conv2d`.

    Returns
    -------
    LowRankSolution
        As from `factorize_matrix`, of kernels; its one bias stands for both. A useful rank is below
        both out_channels and in_channels · kh · kw.

    Raises
    ------
    RuntimeError, NotImplementedError, TypeError, ValueError
        If `biasB` is given without `Wb`, or there are groups; else as from `factorize_matrix`.
    """
    del n_iters
    if biasB is not None and Wb is None:
        raise RuntimeError("biasB: got one without Wb; expected Wb too, or a convolution's biasA")
    refuse_groups(conv2d_kwargs.get("groups", 1))
    latent = "out" if Wb is None else "latent"
    maps = "in H W" if isinstance(X, Tensor) and X.dim() == 3 else "N in H W"
    kernels = {"Wa": (Wa, f"{latent} in kh kw"), "Wb": (Wb, "out latent 1 1")}
    wide = _widened(X=(X, maps), **kernels, biasA=(biasA, latent), biasB=(biasB, "out"))
    channels, in_channels, height, width = Wa.shape
    k = resolve_size("rank", rank, in_channels, channels if Wb is None else len(Wb))
    # Only its geometry is used: each call is given a kernel.
    sizes = (in_channels, channels, (height, width))
    geometry = nn.Conv2d(*sizes, bias=False, device="meta", **conv2d_kwargs)

    def times(matrix: Tensor) -> Tensor:
        weight = _kernel(matrix, height, width)
        maps: Tensor = functional_call(geometry, {"weight": weight}, (wide["X"],))
        return maps.movedim(-3, -1).flatten(0, -2)  # (samples · positions, channels)

    with full_precision(Wa.device):
        second = wide["Wb"].flatten(1).T if "Wb" in wide else None  # (latent, out)
        operator = Operator(wide["Wa"].flatten(1).T, second, wide.get("biasB"))
        if "biasA" in wide:
            operator = replace(operator, bias=operator.outputs(wide["biasA"]))
        wa, wb, bias, reached, nmse = solve(times, operator, k, Wa.dtype)
        wb = None if wb is None else _kernel(wb, 1, 1)
        return LowRankSolution(_kernel(wa, height, width), wb, bias, reached, nmse)


def _kernel(matrix: Tensor, height: int, width: int) -> Tensor:
    """A matrix (in · height · width, out) as a kernel (out, in, height, width)."""
    return matrix.T.reshape(matrix.shape[1], -1, height, width).contiguous()


def resolve_size(option: str, size: int | float, *full: int) -> int:
    """A latent size: below 1 a fraction of the least `full`, at least 1; else a whole number."""
    wanted = "expected a whole number of at least 1 or a fraction in [0, 1)"
    if isinstance(size, bool) or not isinstance(size, numbers.Real):
        raise TypeError(f"{option}: got {size!r}; {wanted}")
    if not (math.isfinite(size) and size >= 0 and (size < 1 or size == int(size))):
        raise ValueError(f"{option}: got {size!r}; {wanted}")
    return max(1, int(size * min(full))) if size < 1 else int(size)


def refuse_groups(groups: int) -> None:
    """Raise NotImplementedError for more than one group."""
    if groups != 1:
        remedy = 'leave the layer alone, or use tdecomp.decompose(model, "lowrank", …)'
        raise NotImplementedError(f"groups: got {groups}; expected 1: {remedy}, which takes them")


def _widened(**expected: tuple[Tensor | None, str]) -> dict[str, Tensor]:
    """The given tensors, detached, in float32 or wider on the device of the weights.

    Each is checked: its numbers, and its shape, such as "N D", in which a name is one size.
    """
    given = {name: value for name, (value, _) in expected.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a tensor of floating point numbers, got {got}")
        if not value.numel():
            raise ValueError(f"{name}: got shape {tuple(value.shape)}; expected something in it")
        if bad := int((~torch.isfinite(value)).sum()):
            mend = "expected finite ones: mend the weights, or leave those samples out"
            raise ValueError(f"{name}: {bad} of {value.numel()} values are NaN or infinite; {mend}")
    shapes, sizes = {name: expected[name][1].split() for name in given}, {"1": 1}
    for name, value in given.items():
        pairs = zip(shapes[name], value.shape, strict=False)
        if len(shapes[name]) != value.dim() or any(sizes.setdefault(n, m) != m for n, m in pairs):
            found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
            wanted = ", ".join(f"{name} ({', '.join(shape)})" for name, shape in shapes.items())
            weights = "a Conv2d's weight as it is, a Linear's transposed"
            raise ValueError(f"got {found}; expected {wanted}: {weights}")
    x, wa = given["X"], given["Wa"]
    dtype = torch.promote_types(torch.promote_types(x.dtype, wa.dtype), torch.float32)
    return {name: value.detach().to(wa.device, dtype) for name, value in given.items()}
