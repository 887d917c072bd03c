"""The smallest rank that keeps a share of the squared singular values."""

from dataclasses import dataclass

import numpy as np

from tdecomp.linalg.spectrum import Spectrum
from tdecomp.ranks.base import Candidate, Choice, LocalSelector, check_share, in_form_of, spectra_of


@dataclass(frozen=True)
class Energy(LocalSelector):
    """The smallest rank that keeps this share of the squared singular values.

    >>> Energy(0.9)
    Energy(share=0.9)

    For Tucker-2 each rank keeps this share of its own channel unfolding; in grouped layers the
    singular values of all groups are summed.

    Parameters
    ----------
    share : float
        Above 0 and at most 1.

    Raises
    ------
    ValueError
        If the share is out of range; and when planning, if a method's rank has no singular values,
        as with CP.
    """

    share: float

    def __post_init__(self) -> None:
        check_share("Energy: expected a share", self.share)

    def choose(self, candidate: Candidate) -> Choice:
        ranks = (self._rank(spectrum) for spectrum in spectra_of(candidate, "Energy"))
        return Choice(candidate, in_form_of(candidate.max_rank, ranks))

    def _rank(self, spectrum: Spectrum) -> int:
        kept = np.cumsum(np.clip(spectrum.squares.sum(axis=0), 0.0, None))
        return min(int(np.searchsorted(kept, self.share * kept[-1])) + 1, len(kept))
