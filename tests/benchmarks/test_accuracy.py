import torch

from benchmarks.accuracy import Case, Result, mean_and_spread, points_table, work_table
from benchmarks.support.output_error import lost_share


def result(case, drop):
    drops = {"fitted": drop, "refitted": drop / 2, "reconstructed": drop / 4}
    passes = {"calibrate + plan": 9.0 + drop, "apply": 0.5, "refitted": 7.0}
    return Result(case, 0.2987, drops, passes, {"refitted": (0.01, 0.02)}, "19 cp")


def test_the_seeds_of_a_line_become_its_mean_and_spread():
    line, other = Case("resnet20", "auto", 0.3, 1.0, 0.6), Case("resnet20", "dense", 0.3)
    results = [result(line, 1.0), result(other, 8.0), result(line, 3.0)]
    points = points_table(results).splitlines()
    assert len(points) == 3 + 2
    assert "0.299" in points[-2]
    assert "+2.00 ± 1.41" in points[-2]
    assert "+1.00 ± 0.71  +0.50 ± 0.35     1 " in points[-2]
    assert "+8.00 " in points[-1]
    work = work_table(results).splitlines()
    assert "11.0 ± 1.4" in work[-3]
    assert "0.0100 / 0.0200 = 0.50" in work[-3]
    assert work[-1].split() == ["bound", "for", "resnet20", "10", "8"]


def test_a_single_value_has_no_spread():
    assert mean_and_spread([0.5], "+.2f") == "+0.50"
    assert mean_and_spread([], ".1f") == ""


def test_the_error_of_a_model_is_a_share_of_the_variance():
    outputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 2
    means = outputs.mean(dim=0).expand(64, 3)
    assert abs(lost_share(outputs, means) - 1) < 1e-6
    assert lost_share(outputs, outputs) == 0
