"""Two of the sweeps in pools of threads; tests/soak has 200."""

import pytest

from tests.sweeps import sweep


@pytest.mark.parametrize("seed", [20, 32], ids=["several models", "one model"])
def test_calls_in_threads_give_what_they_give_in_turn(seed):
    sweep(seed)
