"""Streams that are killed at very many random moments, and gone on with."""

import pytest

from benchmarks.scale.killed import kill_and_resume
from benchmarks.support.fresh_process import in_fresh_process

pytestmark = pytest.mark.soak


def test_killed_at_very_many_random_moments(tmp_path):
    found = in_fresh_process(kill_and_resume, tmp_path, 100, 1)
    assert found.identical == 100
    assert found.killed > 70
