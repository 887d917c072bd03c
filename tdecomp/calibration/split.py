"""Batches in two parts: those to fit to, and those that are held out to tell the error by."""

import random
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from itertools import islice, pairwise
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from tdecomp.model.batches import copied, count_samples, each_tensor

Part = tuple[Any, bool]  # a batch, and whether it is held out

_ROUNDING = 1e-9
# Of loaders, what makes one that yields the same samples in other batches.
_OPTIONS = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor",
    "multiprocessing_context", "generator", "persistent_workers",
)  # fmt: skip


def split_by_samples(
    batches: Any, share: float, limit: int | None
) -> tuple[DataLoader[Any], DataLoader[Any]] | None:
    """Two loaders, to fit to and held out, of other samples of the data set; None if it has none.

    A loader that shuffles has other samples in each pass, which must not change sides.
    """
    if not isinstance(batches, DataLoader) or type(batches).__iter__ is not DataLoader.__iter__:
        return None
    dataset, sampler = batches.dataset, batches.batch_sampler
    if isinstance(dataset, IterableDataset) or sampler is None or not isinstance(dataset, Sized):
        return None
    held = _spread(len(dataset), share)
    if not held:
        return None
    options = {name: getattr(batches, name) for name in _OPTIONS}
    size = batches.batch_size if type(sampler) is BatchSampler else None
    drop = size is not None and batches.drop_last

    def is_held(key: Any) -> bool:
        try:
            return index(key) in held
        except TypeError:  # the key of a data set that is no sequence
            return random.Random(repr(key)).random() < share

    fit = _Side(sampler, lambda key: not is_held(key), limit, size, drop)
    outside = _Side(sampler, is_held, limit, size, drop_last=False)
    fit_loader, held_loader = (
        DataLoader(dataset, batch_sampler=side, **options) for side in (fit, outside)
    )
    return fit_loader, held_loader


def split_by_position(batches: Iterable[Any], share: float, limit: int | None) -> Iterator[Part]:
    """The batches in their order, about a share of the samples held out, or rows of the only one.

    Held out are the smaller of the first two batches, by default the second, and a later one where
    this brings the samples that are held out nearer to the share.
    """
    filled: Iterator[Any] = (batch for batch in islice(batches, limit) if count_samples(batch))
    if not share > 0:
        yield from ((batch, False) for batch in filled)
        return
    for given in filled:
        first = copied(given)  # a loader may fill the same tensors again for the next batch
        second = next(filled, None)
        if second is None:
            yield from _split_rows(first, share)
            return
        sizes = count_samples(first), count_samples(second)
        yield first, sizes[0] < sizes[1]
        yield second, sizes[0] >= sizes[1]
        total, held = sum(sizes), min(sizes)
        for batch in filled:
            size = count_samples(batch)
            total += size
            outside = size <= 2 * (share * total - held) + _ROUNDING
            held += size if outside else 0
            yield batch, outside


def held_among(count: int, share: float) -> int:
    """How many of so many batches of one size are held out."""
    return max(1, int(count * share + 0.5 + _ROUNDING)) if count > 1 and share > 0 else 0


def _split_rows(batch: Any, share: float) -> list[Part]:
    """Two parts of a batch's samples; the whole batch to fit to if it cannot be cut.

    Cut is every tensor in plain containers that is as long as the first one.
    """
    samples = count_samples(batch)
    held = _spread(samples, share)

    def cut(rows: list[int], tensor: Tensor) -> Tensor:
        can_be = tensor.layout in (torch.strided, torch.sparse_coo) and not tensor.is_nested
        can_be = can_be and not tensor.is_meta
        if not can_be or not tensor.dim() or len(tensor) != samples:
            return tensor
        return tensor.index_select(0, torch.tensor(rows, device=tensor.device))

    sides = [row for row in range(samples) if row not in held], sorted(held)
    if not held or _packed(batch):
        return [(batch, False)]
    parts = [each_tensor(batch, partial(cut, rows)) for rows in sides]
    if count_samples(parts[1]) == samples:
        return [(batch, False)]
    return [(parts[0], False), (parts[1], True)]


def _packed(batch: Any) -> bool:
    """Whether its rows are steps of sequences, which cannot be told apart."""
    if isinstance(batch, (list, tuple)) and not isinstance(batch, PackedSequence):
        return any(map(_packed, batch))
    return isinstance(batch, PackedSequence)


def _spread(count: int, share: float) -> frozenset[int]:
    """About a share of so many, at least one of two; one at random of each of equal stretches."""
    number = max(1, round(count * share)) if count > 1 and share > 0 else 0
    draw = random.Random(0)
    edges = [round(k * count / max(number, 1)) for k in range(number + 1)]
    return frozenset(draw.randrange(*ends) for ends in pairwise(edges))


class _Side:
    """A batch sampler of the samples on one side, in the order of another batch sampler."""

    def __init__(
        self,
        sampler: Iterable[list[Any]],
        takes: Callable[[Any], bool],
        limit: int | None,
        size: int | None,
        drop_last: bool,
    ) -> None:
        self._sampler, self._takes = sampler, takes
        self._limit, self._size, self._drop_last = limit, size, drop_last

    def __iter__(self) -> Iterator[list[Any]]:
        """Batches of the size; without one, the parts of the sampler's own on this side."""
        found: list[Any] = []
        whole = False
        for number, keys in enumerate(self._sampler):
            if self._limit is not None and number >= self._limit and (whole or found):
                break  # not before there is a sample: the other side may hold all of the first
            found += filter(self._takes, keys)
            size = len(found) if self._size is None else self._size
            while found and len(found) >= size:
                yield found[:size]
                del found[:size]
                whole = True
        if found and not (whole and self._drop_last):
            yield found
