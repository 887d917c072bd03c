import csv
import json

import pytest

from benchmarks.support.rows import append_row, of_runs, read_rows, write_json, write_rows
from tests.benchmarks.rows import row

ROWS = [row(), row("cp", 0.1, 1 / 3, fitted="data", seed=2), row("tucker2", 0.5, reason='a, "b"')]


def test_rows_come_back_as_they_were(tmp_path):
    for one in ROWS:
        append_row(one, tmp_path / "rows.csv")
    assert read_rows(tmp_path / "rows.csv") == ROWS
    write_rows(ROWS, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "rows.csv").read_text()


def test_the_table_is_tidy(tmp_path):
    write_rows(ROWS, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert len(lines) == len(ROWS)
    assert len({*header}) == len(header) == len(lines[0])
    assert {"method", "share", "seed", "macs_share", "quality", "cpu", "torch"} <= {*header}
    write_json(ROWS, tmp_path / "rows.json")
    plain = json.loads((tmp_path / "rows.json").read_text())
    assert list(plain[0]) == header
    assert plain[2]["quality"] is None


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    write_rows(ROWS, file := tmp_path / "rows.csv")
    file.write_text(file.read_text()[:-60])
    assert read_rows(file) == ROWS[:2]


def test_no_file_has_no_rows_and_another_table_is_refused(tmp_path):
    assert read_rows(tmp_path / "rows.csv") == []
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"rows\.csv holds no rows of this command.*--resume"):
        read_rows(tmp_path / "rows.csv")


def test_of_a_run_that_is_there_twice_the_last_counts():
    better = row("cp", 0.1, 2.0, fitted="data", seed=2)
    assert of_runs([*ROWS, better], [better.run, row().run]) == [better, ROWS[0]]
