"""200 sweeps in pools of threads."""

import pytest

from tests.sweeps import sweep


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_calls_in_threads_give_what_they_give_in_turn(first):
    for seed in range(first, first + 20):
        sweep(seed)
