import pytest

from tdecomp.timing.in_model import InModel


def test_layers_that_take_longer_alone_than_the_model():
    known = InModel.alone(whole=8.0, layers=10.0)
    assert known.rest == 0.0
    assert known.factor * 10.0 == pytest.approx(8.0)


def test_the_line_through_the_two_that_are_nearest():
    points = [(8.0, 10.0), (4.0, 5.0), (2.0, 4.0)]
    known = InModel.through(points, near=4.4)
    assert known is not None
    assert known.factor * 4.0 + known.rest == pytest.approx(5.0)
    assert known.factor * 2.0 + known.rest == pytest.approx(4.0)


@pytest.mark.parametrize("point", [(8.0, 9.0), (9.0, 9.0), (7.0, 10.0)])
def test_what_tells_nothing(point):
    # As much alone and less in the model, or more of the one and less of the other.
    assert InModel.through([(8.0, 10.0), point], near=5.0) is None
