from benchmarks.support.verdict import verdict
from tests.benchmarks.rows import row


def test_the_fastest_of_those_that_are_about_as_good():
    rows = [row(quality=98.0), row("cp", 0.5, 97.0, time=0.9), row("tucker2", 0.5, 96.0, time=0.6),
            row("lowrank", 0.5, 50.0, time=0.4)]  # fmt: skip
    said = verdict(rows)
    assert said.startswith("on this machine use tucker2 at 0.5, as decomposed: 0.60 of the")
    assert said.endswith("accuracy (%) 96.00 (the original's 98.00)")


def test_what_is_ruined_is_not_recommended():
    said = verdict([row(quality=95.0), row("cp", 0.25, 10.0, time=0.3)])
    assert said.startswith("none is of use: accuracy (%) 10.00 at best, the original's 95.00")


def test_none_is_faster():
    rows = [row(quality=98.0), row("cp", 0.5, 97.0, time=0.95, high=1.1)]
    assert "none is measurably faster than the original (nearest: cp" in verdict(rows)


def test_nothing_to_compare():
    assert "nothing was timed" in verdict([row(), row("cp", 0.5, reason="?")])
