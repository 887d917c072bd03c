"""Over 3,000 interrupts and errors at random moments."""

import pytest

from tests.calls import CASES
from tests.interrupted import interrupt


@pytest.mark.soak
@pytest.mark.no_cover
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("name", CASES)
def test_all_or_nothing_is_changed_whenever_it_is_cut_short(name, seed):
    counts = interrupt(name, times=60, seed=seed)
    assert counts["unchanged"] > 0
    print(f"{name}: {dict(counts)}")
