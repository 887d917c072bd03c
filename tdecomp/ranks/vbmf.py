"""The rank that the empirical variational Bayes estimate finds in a layer's weights."""

from dataclasses import dataclass

from tdecomp.linalg.evb import evb_rank
from tdecomp.linalg.spectrum import Spectrum
from tdecomp.ranks.base import Candidate, Choice, LocalSelector, is_share
from tdecomp.ranks.spectral import spectra_of


@dataclass(frozen=True)
class VBMF(LocalSelector):
    """The empirical variational Bayes estimate (Nakajima et al. 2013), noise variance estimated.

    >>> VBMF(), VBMF(weaken=0.5)
    (VBMF(weaken=0.0), VBMF(weaken=0.5))

    For Tucker-2 of the two channel unfoldings (Kim et al. 2016); for grouped layers the largest
    estimate of any group. Never 0: the row says when the estimate was.

    Parameters
    ----------
    weaken : float
        0 is the estimate, 1 the full rank, in between a rank on the way as in MUSCO (Gusak et al.
        2019, section 3.2).
    """

    weaken: float = 0.0

    def __post_init__(self) -> None:
        if self.weaken != 0 and not is_share(self.weaken):
            raise ValueError(f"VBMF: expected weaken from 0 to 1, got {self.weaken!r}")

    def choose(self, candidate: Candidate) -> Choice:
        spectra = spectra_of(candidate, "VBMF")
        limits = candidate.max_rank
        estimates = tuple(_estimate(spectrum) for spectrum in spectra)
        ranks = tuple(
            self._weakened(estimate, limit)
            for estimate, limit in zip(
                estimates, limits if isinstance(limits, tuple) else (limits,), strict=True
            )
        )
        note = None
        if 0 in estimates:
            shown = estimates if isinstance(limits, tuple) else estimates[0]
            note = f"the VBMF estimate was {shown}"
        return Choice(candidate, ranks if isinstance(limits, tuple) else ranks[0], note=note)

    def _weakened(self, estimate: int, limit: int) -> int:
        # Truncation towards the full rank, as in MUSCO; the nudge undoes float round-off only.
        dropped = int((1 - self.weaken) * (limit - estimate) + 1e-9)
        return max(1, limit - dropped)


def _estimate(spectrum: Spectrum) -> int:
    return max(evb_rank(squares, spectrum.shape).rank for squares in spectrum.squares)
