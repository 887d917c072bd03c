"""Unlabelled data, as the user describes it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from tdecomp.calibration.augment import Augment, flip_and_shift
from tdecomp.calibration.moments import Moments
from tdecomp.calibration.split import split_by_samples

Mask = Callable[[Any], Tensor]  # says which rows of a batch count


@dataclass(frozen=True, eq=False)
class Data:
    """Unlabelled batches, with their limits and with the rows that count.

    >>> batches = [{"x": torch.randn(4, 7, 16), "is_token": torch.ones(4, 7)}]
    >>> data = Data(batches, max_batches=10, mask=lambda batch: batch["is_token"].bool())

    Parameters
    ----------
    batches : iterable of batches
        A DataLoader, or any iterable of tensors, tuples or dicts: the inputs of the model. Further
        items of a tuple, such as labels, are ignored. A single tensor or dict is one batch.
    max_batches : int, optional
        The number of batches to use, from the first.
    max_memory : int, optional
        The bytes that sums over layers' inputs may take at a time; by default half of what is free;
        see `calibrate`.
    mask : callable ``(batch) -> Tensor``, optional
        Which rows count, e.g. tokens that are not padding: a bool tensor (batch,) or
        (batch, length). It holds for moments, gradients and the sums of `refit`, in layers whose
        input begins with the shape of the mask: a Linear on (batch, ..., features) or
        (batch, length, ..., features), and, for a mask (batch,), a convolution. It holds for
        outputs of such shapes in `distill` and in errors. All rows count elsewhere.
    augment : callable ``(batch, generator) -> batch``, optional
        Varies batches at random, for `refit`, `distill` and the fits before them; everything else
        uses the batches as they are. None for batches that must not be varied.
    held_out : float
        The share of the samples that nothing is fitted to, up to 0.5; errors are theirs. They are
        those of whole batches, of at least one, or rows of the only one; of a DataLoader, samples
        of its data set, as one that shuffles has others in each pass. With 0, errors are of what
        was fitted to.

    Raises
    ------
    TypeError
        If `batches` cannot be iterated over, or `mask` or `augment` cannot be called.
    ValueError
        If a limit is not a whole number of at least 1, or `held_out` not a number from 0 to 0.5.
    """

    batches: Any
    max_batches: int | None = None
    max_memory: int | None = None
    mask: Mask | None = None
    augment: Augment | None = flip_and_shift
    held_out: float = 0.2

    def __post_init__(self) -> None:
        if isinstance(self.batches, Moments):
            raise TypeError("Data: got Moments; expected data=moments without Data around them")
        if not isinstance(self.batches, Iterable) or isinstance(self.batches, (str, bytes)):
            expected = "batches (a DataLoader, or an iterable of tensors, tuples or dicts)"
            raise TypeError(f"data: expected {expected}, got {type(self.batches).__name__}")
        for name in ("max_batches", "max_memory"):
            limit = getattr(self, name)
            if limit is not None and not (type(limit) is int and limit >= 1):
                expected = f"{name} to be a whole number of at least 1"
                raise ValueError(f"data: expected {expected}, got {limit!r}")
        share = self.held_out
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 0.5:
            raise ValueError(f"data: expected held_out to be a share from 0 to 0.5, got {share!r}")
        for name, call in (("mask", "mask(batch)"), ("augment", "augment(batch, generator)")):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"data: expected None or a callable {call}, got {name}={value!r}")

    @cached_property
    def sides(self) -> tuple[Iterable[Any], Iterable[Any]] | None:
        """The batches to fit to and those held out, where the samples of each are known."""
        return split_by_samples(self.batches, self.held_out, self.max_batches)
