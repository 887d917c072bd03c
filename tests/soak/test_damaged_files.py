"""Thousands of damaged files: none gives anything but a refusal by name or what is right."""

import pytest

from tests.damaged_files import check_damaged


@pytest.mark.soak
def test_damaged_files_are_refused_by_name_or_give_what_is_right(tmp_path):
    outcomes = check_damaged(5000, tmp_path, seed=1)
    assert outcomes.total() == 5000
    for kind in ("checkpoint", "plan", "moments", "profile"):
        assert outcomes[kind, "accepted"] >= 30
        assert outcomes[kind, "refused"] >= 300
