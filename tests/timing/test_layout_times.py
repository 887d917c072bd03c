import pytest

from tdecomp.timing.layout_times import LatencyPredictor


def test_from_the_original_alone():
    assert LatencyPredictor.from_original(layers=8.0, model=10.0) == LatencyPredictor(1.0, 2.0)


def test_layers_that_take_longer_alone_than_the_model():
    predictor = LatencyPredictor.from_original(layers=10.0, model=8.0)
    assert predictor.rest == 0.0
    assert predictor.factor * 10.0 == pytest.approx(8.0)


def test_the_line_through_the_two_nearest_points():
    points = [(8.0, 10.0), (4.0, 5.0), (2.0, 4.0)]
    predictor = LatencyPredictor.through(points, near=4.4)
    assert predictor is not None
    assert predictor.factor * 4.0 + predictor.rest == pytest.approx(5.0)
    assert predictor.factor * 2.0 + predictor.rest == pytest.approx(4.0)


@pytest.mark.parametrize("point", [(8.0, 9.0), (9.0, 9.0), (7.0, 10.0)])
def test_points_on_no_rising_line(point):
    assert LatencyPredictor.through([(8.0, 10.0), point], near=5.0) is None
