"""The smallest rank that keeps a share of the squared singular values."""

from dataclasses import dataclass

import numpy as np

from tdecomp.linalg.spectrum import Spectrum
from tdecomp.ranks.base import Candidate, Choice, LocalSelector, is_share
from tdecomp.ranks.spectral import spectra_of


@dataclass(frozen=True)
class Energy(LocalSelector):
    """Keep this share of the squared singular values.

    >>> Energy(0.9)
    Energy(share=0.9)

    For Tucker-2 of each of the two channel unfoldings; for grouped layers of all groups together.

    Parameters
    ----------
    share : float
        Above 0 and at most 1.
    """

    share: float

    def __post_init__(self) -> None:
        if not is_share(self.share):
            raise ValueError(f"Energy: expected a share above 0 and at most 1, got {self.share!r}")

    def choose(self, candidate: Candidate) -> Choice:
        ranks = tuple(self._rank(s) for s in spectra_of(candidate, "Energy"))
        return Choice(candidate, ranks if isinstance(candidate.max_rank, tuple) else ranks[0])

    def _rank(self, spectrum: Spectrum) -> int:
        kept = np.cumsum(np.clip(spectrum.squares.sum(axis=0), 0.0, None))
        return min(int(np.searchsorted(kept, self.share * kept[-1])) + 1, len(kept))
