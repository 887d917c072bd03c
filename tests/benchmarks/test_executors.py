"""What the measurement of executors prints, at tiny sizes."""

from argparse import Namespace

import pytest

from benchmarks.scale.executors import rows_of, run

SECONDS = {
    "one thread": [4.0, 4.0, 8.0], "two threads": [2.0, 2.0, 2.0],
    "one worker of Dask": [4.0, 4.0, 4.0], "two workers of Dask": [2.0, 2.0, 4.0],
}  # fmt: skip


def test_ways_are_compared_round_by_round():
    first, threads, *_, last = rows_of("work", SECONDS, 1.5)
    assert first.cells() == ["work: one thread", "", "4.00 (4.00–8.00) s", ""]
    assert threads.measured == "2.00 (2.00–2.00) s, 2.00 (2.00–4.00) times faster"
    assert last.cells()[1:] == ["≥ 1.5 times faster", "2.00 (1.00–2.00) times faster", "yes"]


@pytest.mark.parametrize("least, within", [(2.5, False), (None, None)])
def test_the_bound_is_that_of_two_workers_of_dask(least, within):
    *others, last = rows_of("work", SECONDS, least)
    assert last.within is within
    assert all(row.within is None for row in others)


@pytest.mark.slow
def test_every_way_is_measured(tmp_path):
    rows = run(Namespace(quick=True, folder=tmp_path))
    assert len(rows) == 4 + 3 * 6
    assert all("times faster" in row.measured for row in rows if "one thread" not in row.what)
