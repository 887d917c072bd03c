from dataclasses import replace

import torch
from torch import nn

from tdecomp.timing.setting import Setting, in_layout, layout_of


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


def test_layouts():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 8))
    assert layout_of(model) == "contiguous"
    assert layout_of(in_layout(model, "channels_last")) == "channels_last"
    assert layout_of(in_layout(model, "contiguous")) == "contiguous"
    # Without a kernel that tells them apart.
    assert layout_of(nn.Linear(2, 2)) == "contiguous"


def test_inputs_of_every_shape():
    image, vector = torch.zeros(1, 4, 3, 3), torch.zeros(1, 4)
    given = ({"a": image, "b": vector}, "word")
    found = in_layout(given, "channels_last")
    assert found[0]["a"].is_contiguous(memory_format=torch.channels_last)
    assert found[0]["b"] is vector
    assert found[1] == "word"
    assert image.is_contiguous()
