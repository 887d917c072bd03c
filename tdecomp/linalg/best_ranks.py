"""Ranks of several matrices that lose least together, each matrix with a rank of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tdecomp.linalg.column_space import in_column_spaces
from tdecomp.linalg.leading_outputs import outputs_moment
from tdecomp.linalg.nested_losses import nested_losses
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.spectrum import tails_of

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class BestRanks:
    """Ranks of growing cost that lose least together, and what their best fits lose.

    A method of several ranks whose losses are known without a fit has them as `best_ranks`.

    Attributes
    ----------
    ranks : tuple of tuple of int
        Ascending, one rank after the other raised.
    alone : tuple of Tensor
        For each part what its best fits of rank 0, 1, 2 … lose, ``tr(D G Dᵀ)`` of its difference D.
    weighted : Tensor or None
        For each of `ranks` the loss ``tr(H D G Dᵀ)`` of the whole difference; None where the
        importance H of the outputs is not known.
    """

    ranks: tuple[Ranks, ...]
    alone: tuple[Tensor, ...]
    weighted: Tensor | None = None

    def lost(self, ranks: Ranks) -> float:
        """What any ranks lose together, all outputs counting alike."""
        return sum(float(lost[rank]) for lost, rank in zip(self.alone, ranks, strict=True))


def best_ranks(
    parts: Sequence[Tensor],
    moment: SecondMoment | None,
    importance: Tensor | None,
    steps: Sequence[int],
) -> BestRanks:
    """Of matrices (out_i, in) of the same inputs, in the norm of their moment.

    Each is cut by itself to its leading principal outputs. A rank more of one costs ``in + out_i``;
    the next is always that which loses least for its cost. `importance` (out, out) is that of all
    outputs; ranks are multiples of the part's entry of `steps`. Large parts may be float32.
    """
    prices = [sum(part.shape) for part in parts]
    if importance is None:
        alone = tuple(nested_losses(part, moment)[0] for part in parts)
        return BestRanks(_by_gain(alone, prices, steps), alone)
    inner, importance = in_column_spaces(parts, importance)
    assert importance is not None
    outputs = outputs_moment(torch.cat(inner), moment)  # (components, components)
    outputs = outputs.tril_().add_(outputs.tril(-1).T)
    sizes = [len(part) for part in inner]  # the largest useful ranks
    del inner
    leading = [torch.linalg.eigh(own) for own in diagonal_blocks(outputs, sizes)]
    values = [found.eigenvalues.flip(0).clamp_min(0.0) for found in leading]
    # In the directions of all parts' leading outputs: errors of one are errors of others, too.
    bases = [found.eigenvectors.flip(1) for found in leading]
    del leading
    products = _rotated(importance, bases)
    counts = zip(values, products.diagonal().split(sizes), strict=True)
    gains = [tails_of(own * count.clamp_min(0.0)) for own, count in counts]
    ranks = _by_gain(gains, prices, steps)
    products *= _rotated(outputs, bases)
    order = _order(ranks, sizes)
    weighted = _lost_from(products[order][:, order])[[sum(rank) for rank in ranks]]
    return BestRanks(ranks, tuple(map(tails_of, values)), weighted)


def diagonal_blocks(matrix: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The blocks of these sizes on the diagonal."""
    rows = matrix.split([*sizes])
    return [row.split([*sizes], dim=1)[i] for i, row in enumerate(rows)]


def _rotated(matrix: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """A matrix (out, out) in the bases (out_i, components) of the parts of its rows and columns."""
    sizes = [len(basis) for basis in bases]
    columns = zip(matrix.split(sizes, dim=1), bases, strict=True)
    right = torch.cat([block @ basis for block, basis in columns], dim=1)
    rows = zip(bases, right.split(sizes), strict=True)
    return torch.cat([basis.T @ block for basis, block in rows])


def _by_gain(
    losses: Sequence[Tensor], prices: Sequence[int], steps: Sequence[int]
) -> tuple[Ranks, ...]:
    """The ranks, from one step of each part on, in the order in which raising them gains most."""
    gains, owners = [], []
    for i, (lost, price, step) in enumerate(zip(losses, prices, steps, strict=True)):
        left = lost[step::step].cpu().numpy()  # at one step, two steps, …
        gains.append(_falling((left[:-1] - left[1:]) / (price * step)))
        owners.append(np.full(len(left) - 1, i))
    order = np.concatenate(owners)[np.argsort(-np.concatenate(gains), kind="stable")]
    raised = np.eye(len(losses), dtype=int)[order].cumsum(axis=0)  # (raises, parts)
    ranks = np.vstack([np.zeros_like(raised[:1]), raised]) + 1 if len(order) else None
    if ranks is None:
        return (tuple(steps),)
    return tuple(tuple(row) for row in (ranks * np.array(steps)).tolist())


def _falling(gains: np.ndarray) -> np.ndarray:
    """The gains, averaged with those that follow wherever these are larger: all have to be taken.

    Pool adjacent violators: Ayer et al. 1955, "An Empirical Distribution Function for Sampling with
    Incomplete Information". Importance makes this needed: without it gains fall by themselves.
    """
    pools: list[tuple[float, int]] = []
    for gain in gains.tolist():
        mean, count = gain, 1
        while pools and pools[-1][0] < mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    return np.repeat([mean for mean, _ in pools], [count for _, count in pools])


def _order(ranks: Sequence[Ranks], largest: Sequence[int]) -> list[int]:
    """The components of all parts, one part's after the other's, as these ranks keep them."""
    begins = np.cumsum([0, *largest[:-1]]).tolist()
    kept = [0] * len(largest)
    order: list[int] = []
    for rank in (*ranks, tuple(largest)):
        for i, (begin, before, now) in enumerate(zip(begins, kept, rank, strict=True)):
            order += range(begin + before, begin + now)
            kept[i] = now
    return order


def _lost_from(products: Tensor) -> Tensor:
    """What all components but the first 0, 1, 2 … lose: the sum over all pairs of them."""
    with_later = products.diagonal() + 2 * products.triu(1).sum(dim=1)
    sums = with_later.flip(0).cumsum(0).flip(0)
    return torch.cat([sums, sums.new_zeros(1)]).clamp_min(0.0)
