"""The rank that the empirical variational Bayes estimate finds in a layer's weights."""

from dataclasses import dataclass

from tdecomp.linalg.evb import evb_rank
from tdecomp.linalg.spectrum import Spectrum
from tdecomp.ranks.base import (
    Candidate,
    Choice,
    LocalSelector,
    as_tuple,
    check_share,
    in_form_of,
    spectra_of,
)


@dataclass(frozen=True)
class VBMF(LocalSelector):
    """The empirical variational Bayes estimate (Nakajima et al. 2013), noise variance estimated.

    >>> VBMF(), VBMF(weaken=0.5)
    (VBMF(weaken=0.0), VBMF(weaken=0.5))

    For Tucker-2 each rank is the estimate of its own channel unfolding (Kim et al. 2016); for
    grouped layers it is the largest estimate of any group. An estimate of 0 gives rank 1, and the
    row says so.

    Parameters
    ----------
    weaken : float
        0 gives the estimate, 1 the full rank, values in between a rank between the two, as in
        MUSCO (Gusak et al. 2019, section 3.2).

    Raises
    ------
    ValueError
        If `weaken` is not from 0 to 1; and when planning, if a method's rank has no singular
        values, as with CP.
    """

    weaken: float = 0.0

    def __post_init__(self) -> None:
        if self.weaken != 0:
            check_share("VBMF: expected weaken", self.weaken, "from 0 to 1")

    def choose(self, candidate: Candidate) -> Choice:
        limits = candidate.max_rank
        estimates = [_estimate(spectrum) for spectrum in spectra_of(candidate, "VBMF")]
        pairs = zip(estimates, as_tuple(limits), strict=True)
        rank = in_form_of(limits, (self._weakened(estimate, limit) for estimate, limit in pairs))
        note = f"the VBMF estimate was {in_form_of(limits, estimates)}" if 0 in estimates else None
        return Choice(candidate, rank, note=note)

    def _weakened(self, estimate: int, limit: int) -> int:
        # Truncation towards the full rank, as in MUSCO; the nudge undoes float round-off only.
        dropped = int((1 - self.weaken) * (limit - estimate) + 1e-9)
        return max(1, limit - dropped)


def _estimate(spectrum: Spectrum) -> int:
    return max(evb_rank(squares, spectrum.shape).rank for squares in spectrum.squares)
