from benchmarks.support.comparison import ORIGINAL, Measurement
from benchmarks.support.timing import Latency
from benchmarks.support.verdict import verdict


def line(label, ratio, accuracy=None, *, high=None, macs=0.5):
    latency = Latency(ratio, (ratio, ratio), ratio, (ratio, high or ratio))
    return Measurement(
        label,
        None if label == ORIGINAL else label,
        "0.5",
        1,
        1,
        macs_ratio=macs,
        latency=latency,
        accuracy_before=accuracy,
    )


def test_the_fastest_of_those_that_are_about_as_accurate():
    lines = [line(ORIGINAL, 1.0, 0.98), line("cp", 0.9, 0.97), line("tucker2", 0.6, 0.96),
             line("lowrank", 0.4, 0.5)]  # fmt: skip
    assert verdict(lines).startswith("on this machine use tucker2 at 0.5: 0.60 of the original's")
    assert "accuracy 96.00%" in verdict(lines)


def test_without_accuracies_the_fastest():
    lines = [line(ORIGINAL, 1.0), line("cp", 0.9), line("lowrank", 0.4)]
    assert verdict(lines).startswith("on this machine use lowrank")
    assert "accuracy" not in verdict(lines)


def test_none_is_faster():
    lines = [line(ORIGINAL, 1.0, 0.98), line("cp", 0.95, 0.97, high=1.1)]
    assert "none is measurably faster than the original (nearest: cp" in verdict(lines)


def test_nothing_to_compare():
    assert "nothing was timed" in verdict([line(ORIGINAL, 1.0)])
