import pytest

from benchmarks.support.figure import comparison_figure, curves_of, draw_comparison, styles_of
from benchmarks.support.summary import best_of, lines_of
from tests.benchmarks.rows import row

ROWS = [
    row(),
    row("cp", 0.5, 80.0, time=0.9),
    row("cp", 0.1, 60.0, time=0.7),
    row("cp", 0.1, 64.0, time=0.7, seed=1),
    row("tucker2", 0.5, 85.0, fitted="data"),
    row("tucker2", 0.1, reason="no such rank", fitted="data"),
]


def test_points_stand_where_they_were_measured():
    cp, tucker2 = curves_of(lines_of(ROWS), "macs_share", "quality")
    assert cp.name == ("cp", "weights", "uniform")
    assert cp.x == [0.98 * 0.1, 0.98 * 0.5]
    assert cp.y == [62.0, 80.0]
    assert (cp.low[0], cp.high[0]) == pytest.approx((62 - 8**0.5, 62 + 8**0.5))
    assert (cp.low[1], cp.high[1]) == (80.0, 80.0)
    assert (tucker2.x, tucker2.y) == ([0.49], [85.0])
    assert curves_of(lines_of(ROWS), "time_share", "quality")[0].x == [0.7, 0.9]


def test_networks_of_the_same_cost_are_not_moved_aside():
    same = [row("cp", 0.05, 50.0), row("lowrank", 0.05, 50.0), row("spatial", 0.05, 50.0)]
    curves = curves_of(lines_of(same), "macs_share", "quality")
    assert [curve.x for curve in curves] == [[0.98 * 0.05]] * 3


def methods(best):
    return {share: [line.run.method for line in lines] for share, lines in best.items()}


def test_the_best_of_each_share():
    best = best_of(lines_of(ROWS), "quality")
    assert methods(best) == {0.5: ["tucker2"], 0.1: ["cp"]}
    best = best_of(lines_of(ROWS), "time_share")
    assert methods(best) == {0.5: ["tucker2"], 0.1: ["cp"]}
    best = best_of(lines_of([*ROWS, row("lowrank", 0.5, 85.0)]), "quality")
    assert methods(best)[0.5] == ["tucker2", "lowrank"]


def test_no_point_is_beyond_the_edge():
    further = row("lowrank", 0.9, 88.0, finetune=10)  # than the points of the first stage
    figure = comparison_figure([*ROWS, further], "quality", "of 5 $ and more")
    for axes in figure.axes:
        assert axes.get_xlim()[0] == 0
        assert axes.get_xlim()[1] > 0.9


def test_one_methods_budget_looks_other_than_its_even_shares():
    rows = [row("cp", 0.5), row("cp", 0.5, ranks="budget"), row("auto", 0.5, ranks="budget")]
    even, budget, auto = styles_of(lines_of(rows)).values()
    assert (even.line, budget.line, auto.line) == ("--", "-.", "--")


@pytest.mark.parametrize("y", ["quality", "output_error", "time_share"])
def test_a_picture_is_drawn_and_the_same_again(tmp_path, y):
    rows = [*ROWS, row("cp", 0.5, 88.0, finetune=10), row(finetune=10)]
    for name in ("a.svg", "b.svg"):
        assert draw_comparison(rows, tmp_path / name, y=y, title="net on toys")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert len(text) < 150_000


def test_there_is_no_picture_of_what_was_not_measured(tmp_path):
    failed = [row(reason="?"), row("cp", 0.5, reason="?")]
    assert not draw_comparison(failed, tmp_path / "a.svg", y="quality", title="nothing")
    assert not (tmp_path / "a.svg").exists()
