"""5,000 plans under a budget, by brute force."""

import pytest

from tests.ranks.brute_force import problems


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, 1000, 125))
def test_plans_lose_least_of_all_plans_there_are(first):
    found = [problem for seed in range(first, first + 125) for problem in problems(seed)]
    assert len(found) == 625
    assert not any(found), "\n".join(filter(None, found))
