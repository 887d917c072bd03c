"""What selectors that read singular values share."""

from tdecomp.linalg.spectrum import Spectrum
from tdecomp.ranks.base import Candidate


def spectra_of(candidate: Candidate, selector: str) -> tuple[Spectrum, ...]:
    """The candidate's spectra, one per rank.

    Raises
    ------
    ValueError
        If its method's rank has no meaning for singular values, as with CP.
    """
    spectra = candidate.spectra()
    if spectra is None:
        raise ValueError(
            f"layer {candidate.layer!r}: {selector} reads singular values, which say nothing of "
            f"the rank of {candidate.method!r}. Selectors that apply to it: an int, a float or "
            "Ratio(..., of='rank'), Ratio(..., of='params'), Ratio(..., of='macs'), 'breakeven'"
        )
    return spectra
