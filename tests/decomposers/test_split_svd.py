"""One SVD for each part of a fused Linear: the oracle, its ranks, and when a budget takes it."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import LayerSpec, SplitSVD
from tdecomp.decomposers.fit_layer import factorize, spectra_of
from tdecomp.decomposers.svd import SVD
from tdecomp.layers.split_linear import SplitLinear, SplitStage
from tests.decomposers.oracle import MOMENT_KINDS, ExactMethodCase, distance
from tests.geometries import Geometry, geometries

QUIET = {"progress": False}


@dataclass(frozen=True)
class FusedGeometry(Geometry):
    """A Linear of which it is known that it is several."""

    parts: tuple[int, ...] = ()

    @property
    def spec(self):
        return replace(LayerSpec.of(self.layer()), parts=self.parts)


def fused(into, *parts, **options):
    return FusedGeometry(nn.Linear, (into, sum(parts)), options=options, parts=parts)


FUSED = (
    fused(5, 5, 5, 5),
    fused(7, 4, 3, bias=False),
    fused(6, 6, 2, 2),
    fused(3, 5, 1, 4),
    fused(1, 2, 2),
)


def halved(geometry):
    into, out = geometry.channels
    return fused(into, out, out, **geometry.options)


class TestSplitSVD(ExactMethodCase):
    decomposer = SplitSVD()
    drawn = geometries(ndims=(0,)).map(halved)
    dense = LayerSpec(10, 24, parts=(8, 6, 10))

    def takes(self, spec):
        return bool(spec.parts)

    def taken(self):
        return FUSED

    def ranks(self, spec):
        largest = self.decomposer.max_rank(spec)
        mixed = tuple(max(1, most // (i + 2)) for i, most in enumerate(largest))
        return sorted({(1,) * len(largest), mixed, largest})

    def wrong_ranks(self, largest):
        *first, last = largest
        wrong = [(*first, 0), (*first, -1), (*first, last + 1), (*first, 1.0), (*first, True)]
        return [*wrong, 1, (*largest, 1), tuple(first), ()]

    # Layers without groups only, and the last layer is its own.

    def test_groups_are_fitted_one_by_one(self):
        with pytest.raises(ValueError, match="parts"):
            replace(self.dense, in_channels=20, out_channels=48, groups=2)

    test_groups_are_fitted_to_their_own_data = test_groups_are_fitted_one_by_one

    def stock(self, chain):
        return [chain[0], *chain[-1].parts]

    # -- its own --------------------------------------------------------------------------------

    def test_each_part_is_an_svd_of_its_own(self):
        weight, moment = self.weight(self.dense), self.moment(self.dense)
        ranks = (3, 2, 5)
        for moments in (None, [moment]):
            both = factorize(SplitSVD(), weight, self.dense, ranks, moments).to_kernel()
            alone = [
                factorize(SVD(), part, LayerSpec(10, len(part)), rank, moments).to_kernel()
                for part, rank in zip(weight.split([8, 6, 10]), ranks, strict=True)
            ]
            # The scale that is taken out first, the largest entry, differs.
            assert distance(both, torch.cat(alone)) < 1e-10

    def test_spectra_are_those_of_the_parts(self):
        weight = self.weight(self.dense)
        spectra = spectra_of(SplitSVD(), weight, self.dense)
        scale = weight[:8].abs().max() ** 2
        for spectrum, part in zip(spectra, weight.split([8, 6, 10]), strict=True):
            squares = torch.from_numpy(spectrum.squares[0]) * scale
            torch.testing.assert_close(squares, torch.linalg.svdvals(part) ** 2)

    def losses(self, kind, weighted):
        """The best ranks, and the matrices that their losses are measured by."""
        weight, out = self.weight(self.dense), self.dense.out_channels
        moment = None if kind is None else self.moment(self.dense, kind)
        root = self.weight(LayerSpec(out, out), seed=7)
        importance = root @ root.T if weighted else None
        method = self.decomposer.for_layer(self.dense)
        best = method.best_ranks(weight, moment, importance, (1, 1, 1))
        seen = torch.eye(self.dense.fan_in).double()
        if moment is not None:
            seen = moment.matrix if moment.matrix is not None else moment.rows.T @ moment.rows

        def lost(rank, counts):
            fitted = factorize(self.decomposer, weight, self.dense, rank, moment and [moment])
            gone = weight - fitted.to_kernel()
            return (counts @ gone @ seen @ gone.T).trace().item()

        return best, lost, importance

    @pytest.mark.parametrize("kind", [None, *MOMENT_KINDS])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_losses_of_the_best_ranks_are_those_of_the_fits(self, kind, weighted):
        best, lost, importance = self.losses(kind, weighted)
        alike = torch.eye(self.dense.out_channels).double()
        whole = best.lost((0, 0, 0))
        assert best.ranks[0] == (1, 1, 1)
        assert best.ranks[-1] == self.decomposer.max_rank(self.dense)
        for i, rank in enumerate(best.ranks):
            assert best.lost(rank) == pytest.approx(lost(rank, alike), rel=1e-6, abs=1e-8 * whole)
            if weighted:
                expected = lost(rank, importance)
                most = best.weighted[0].item()
                assert best.weighted[i].item() == pytest.approx(expected, rel=1e-6, abs=1e-8 * most)
        assert (best.weighted is None) == (not weighted)

    @pytest.mark.parametrize("kind", [None, "full"])
    def test_no_other_ranks_that_cost_as_much_lose_less(self, kind):
        best, _, _ = self.losses(kind, weighted=False)
        largest = self.decomposer.max_rank(self.dense)
        prices = [10 + size for size in self.dense.parts]
        every = [*itertools.product(*(range(1, most + 1) for most in largest))]

        def cost(rank):
            return sum(price * r for price, r in zip(prices, rank, strict=True))

        for rank in best.ranks:
            others = [best.lost(other) for other in every if cost(other) <= cost(rank)]
            assert best.lost(rank) <= min(others) * (1 + 1e-9) + 1e-12
        for before, rank in itertools.pairwise(best.ranks):
            assert sum(rank) == sum(before) + 1

    def test_steps_are_kept(self):
        method = self.decomposer.for_layer(self.dense)
        best = method.best_ranks(self.weight(self.dense), None, None, (4, 2, 3))
        assert best.ranks[0] == (4, 2, 3)
        assert best.ranks[-1] == (8, 6, 9)
        assert len(best.ranks) == 1 + 1 + 2 + 2
        assert all(r % s == 0 for rank in best.ranks for r, s in zip(rank, (4, 2, 3), strict=True))
