"""A hundredth of the campaign of `make soak`."""

from tests.damaged_files import check_damaged


def test_damaged_files_are_refused_by_name_or_give_what_is_right(tmp_path):
    refused = check_damaged(50, tmp_path)
    assert {kind for kind, outcome in refused if outcome == "refused"} == {
        "checkpoint", "plan", "moments", "profile",
    }  # fmt: skip
