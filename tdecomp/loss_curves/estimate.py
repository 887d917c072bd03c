"""How long the drafts of a plan are going to take, said until the first ones are made."""

import time
from collections.abc import Sequence

import torch

from tdecomp.calibration.moments import Moments
from tdecomp.loss_curves.offers import Able

_LONG = 30.0  # seconds that are worth a word
_SIDE = 512  # of the matrices by which the speed of products is measured


def expected_time(able: Sequence[Able], moments: Moments | None) -> str:
    """In words, how long the drafts will take about; none if that is not long."""
    operations = products_of_drafts(able, moments)
    seconds = operations / _speed() if operations else 0.0
    if seconds <= _LONG:
        return ""
    return f"about {seconds / 60:.0f} minutes" if seconds > 90 else f"about {seconds:.0f} seconds"


def products_of_drafts(able: Sequence[Able], moments: Moments | None) -> float:
    """The multiplications and additions of all drafts in the norm of the inputs."""
    total = 0.0
    for site, methods in able:
        if moments is None or site.name not in moments or site.spec is None:
            continue
        drafted = [method for method in methods if method.iterative and method.uses_moments]
        products = sum(method.draft_products for method in drafted)
        seen, spec = moments[site.name], site.spec
        rows = spec.fan_in if seen.rows is None else seen.rows.shape[1]
        total += 2.0 * products * spec.out_channels * spec.fan_in * rows
    return total


def _speed() -> float:
    """The operations that this machine makes in a second, in single precision."""
    square = torch.ones(_SIDE, _SIDE, device="cpu")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        square @ square
        seconds.append(time.perf_counter() - start)
    return 2.0 * _SIDE**3 / max(min(seconds), 1e-9)
