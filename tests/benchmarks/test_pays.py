import pytest

from benchmarks.pays import (
    BATCHES,
    METHODS,
    POINTWISE,
    SIZES,
    Point,
    Size,
    at_half,
    draw,
    measure,
    tables,
)


def points(size, method, *pairs, batch=1):
    return [Point(size, batch, method, "8", macs, time, time, time) for macs, time in pairs]


def test_half_lies_between_the_points_of_the_picture():
    size = SIZES[0]
    made = points(size, "cp", (0.6, 0.9), (0.4, 0.5)) + points(size, "spatial", (0.1, 0.2))
    found = at_half(made, [size], ["cp", "spatial"])
    assert found["layer"] == [f"64 channels, 56×56, batch {batch}" for batch in BATCHES]
    assert found["cp"] == ["0.70", "–"]
    assert found["spatial"] == ["–", "–"]  # not measured at half


def test_both_kinds_of_layers_are_told(tmp_path):
    made = points(POINTWISE[0], "svd", (0.4, 0.5), (0.6, 0.5), batch=8)
    text = tables(made, "github")
    assert "| 256→64 channels, 56×56, batch 8 " in text
    assert text.count("| 3×3 convolution ") == text.count("| 1×1 convolution ") == 1
    draw(made, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 0


@pytest.mark.parametrize("size", [Size(32, 32, 3, 6), Size(64, 32, 1, 6)])
def test_chains_are_timed_with_their_layer(size):
    found = list(measure(size, batch=1, multiple=8, count=2))
    assert {point.method for point in found} == ({*METHODS} if size.kernel > 1 else {"svd"})
    assert all(point.time > 0 for point in found)
    assert all(0 < point.macs < 1.5 for point in found)
