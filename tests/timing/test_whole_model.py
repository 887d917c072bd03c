from dataclasses import replace

import pytest
import torch
from torch import nn

from tdecomp.model.example import Example
from tdecomp.timing.speed import Quartiles, Speed
from tdecomp.timing.whole_model import compare, measured_speed
from tests.unchanged import unchanged


def convs(count):
    return nn.Sequential(*[nn.Conv2d(32, 32, 3, padding=1) for _ in range(count)], nn.Dropout())


def test_a_smaller_model_is_faster_and_neither_is_changed():
    large, small, x = convs(12).train(), convs(1), torch.zeros(4, 32, 16, 16)
    state = torch.random.get_rng_state()
    with unchanged(large), unchanged(small):
        layouts = ("contiguous", "channels_last")
        speed = compare(large, small, Example(x), (layouts, layouts), rounds=3)
    assert large.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert speed.measured.median < 1
    assert speed.seconds_before > 0
    assert {speed.layout_before, speed.layout} <= set(layouts)


def test_the_best_layout_against_the_best(stopwatch):
    stopwatch.slow_layouts = {"channels_last": 2.0}
    example, layouts = Example(torch.zeros(1, 32, 8, 8)), ("contiguous", "channels_last")
    speed = compare(convs(2), convs(1), example, (layouts, layouts), stopwatch=stopwatch)
    assert (speed.layout_before, speed.layout) == ("contiguous", "contiguous")
    assert abs(speed.measured.median - 0.5) < 1e-6
    # The original in its best layout, whatever the result was planned for.
    speed = compare(convs(2), convs(1), example, (layouts, layouts[1:]), stopwatch=stopwatch)
    assert (speed.layout_before, speed.layout) == ("contiguous", "channels_last")
    assert abs(speed.measured.median - 1.0) < 1e-6


def test_a_result_in_the_mode_of_its_plan(stopwatch):
    example, tried = Example(torch.zeros(1, 32, 8, 8)), ("channels_last",)
    planned = Speed(1.0, *tried, *tried, 0.4, budget=0.5, tried=tried)
    speed = measured_speed(convs(2), convs(1), planned, example, stopwatch)
    assert (speed.layout, speed.predicted, speed.budget) == ("channels_last", 0.4, 0.5)
    assert abs(speed.measured.median - 0.5) < 1e-6
    speed = measured_speed(convs(2), convs(1), None, example, stopwatch)
    assert (speed.layout, speed.predicted) == ("contiguous", None)


def test_plain_data():
    speed = Speed(
        0.5, "contiguous", "channels_last", 0.5, Quartiles(0.6, 0.5, 0.7), 0.4, True,
        ("contiguous",),
    )  # fmt: skip
    assert Speed.from_dict(speed.to_dict()) == speed
    bare = Speed(0.5, "contiguous", "contiguous")
    assert Speed.from_dict(bare.to_dict()) == bare


def test_words():
    speed = Speed(
        0.5, "contiguous", "channels_last", 0.5, Quartiles(0.6, 0.55, 0.7), 0.4, compiled=True
    )
    words = str(speed)
    for part in ("measured time 0.600", "predicted 0.500", "asked for 0.4"):
        assert part in words
    assert "contiguous before, channels_last after" in words
    assert "compiled" in words
    (missed,) = speed.shortfalls
    assert missed == "the time that was asked for, 0.4 of the original's, is missed by 50.0%"
    slower = Speed(0.5, "contiguous", "contiguous", measured=Quartiles(1.2, 1.1, 1.3))
    assert "SLOWER than the original" in slower.shortfalls[0]
    unclear = Speed(0.5, "contiguous", "contiguous", measured=Quartiles(1.0, 0.9, 1.1))
    assert "not measurably faster" in unclear.shortfalls[0]
    met = Speed(0.5, "contiguous", "contiguous", 0.5, Quartiles(0.5, 0.5, 0.5), 0.5)
    assert not met.shortfalls
    assert "predicted 0.500 of the original's time" in str(replace(met, measured=None))


def test_times_and_layouts_that_cannot_be():
    for quartiles in ((0.0, 0.0, 1.0), (2.0, 1.0, 1.5), (1.0, 0.5, float("nan"))):
        with pytest.raises(ValueError, match="expected quartiles above 0 in their order"):
            Quartiles(*quartiles)
    with pytest.raises(ValueError, match="expected layouts of"):
        Speed(1.0, "contiguous", "upside down")
    with pytest.raises(ValueError, match="a budget above 0"):
        Speed(1.0, "contiguous", "contiguous", budget=0)
