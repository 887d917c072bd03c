"""A few of the interrupts and errors at random moments; tests/soak has thousands."""

import pytest

from tests.calls import CASES
from tests.interrupted import interrupt


@pytest.mark.no_cover  # coverage.py holds a lock of its own for ever if it is interrupted itself
# Python ignores, and reports, an interrupt that strikes a destructor, such as those of torch.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CASES)
def test_all_or_nothing_is_changed_whenever_it_is_cut_short(name):
    assert interrupt(name, times=3).total() == 3
