"""Reported errors of 105 drawn networks against those on new inputs, for each way to recover."""

import statistics

import pytest

from benchmarks.fresh_inputs import ENOUGH, gain_kept, outcomes


@pytest.mark.soak
@pytest.mark.parametrize("step", ["refit", "distill"])
def test_what_is_reported_holds_for_new_inputs(step):
    found = list(outcomes(105, step))
    few = [one.holds for one in found if one.rows < ENOUGH]
    enough = [one.ratio for one in found if one.rows >= ENOUGH]
    assert abs(statistics.median(enough) - 1) < 0.15
    assert sum(few) / len(few) >= 0.9
    assert sum(one.worse for one in found) <= 1
    assert gain_kept(2, step) >= 0.9
