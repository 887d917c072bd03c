from dataclasses import replace

import torch
from torch import nn

from tdecomp.timing.stopwatch import Setting


def test_that_of_most_parameters():
    model = nn.Sequential(nn.Linear(8, 8).double(), nn.Linear(2, 2))
    setting = Setting.of(model, compiled=True)
    assert (setting.device, setting.dtype, setting.compiled) == ("cpu", "float64", True)
    assert setting.threads == torch.get_num_threads()
    assert "float64" in str(setting)
    assert "compiled" in str(setting)


def test_differences_are_named():
    setting = Setting.of(nn.Linear(2, 2))
    other = replace(setting, threads=99, machine="another")
    assert setting.differences(setting) == []
    words = "; ".join(other.differences(setting))
    assert "threads 99" in words
    assert "machine 'another'" in words
