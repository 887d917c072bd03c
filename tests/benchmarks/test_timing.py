import torch
from torch import nn

from benchmarks.support.timing import interleaved_latencies


def test_the_reference_has_ratio_one_and_more_work_takes_longer():
    models = {"small": nn.Linear(8, 8), "large": nn.Sequential(*[nn.Linear(512, 512)] * 8)}
    pad = nn.Sequential(nn.ZeroPad1d((0, 504)), models["large"])
    latencies = interleaved_latencies(
        {"small": models["small"], "large": pad}, torch.zeros(64, 8), rounds=3, min_block=0.002
    )
    small, large = latencies["small"], latencies["large"]
    assert (small.ratio, small.ratio_quartiles) == (1.0, (1.0, 1.0))
    assert large.ratio > 1
    assert large.quartiles[0] <= large.median <= large.quartiles[1]
    assert 0 < small.median < large.median
