from torch import nn

from tdecomp.model.example import in_layout, layout_of


def test_layouts():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 8))
    assert layout_of(model) == "contiguous"
    assert layout_of(in_layout(model, "channels_last")) == "channels_last"
    assert layout_of(in_layout(model, "contiguous")) == "contiguous"
    # Without a kernel that tells them apart.
    assert layout_of(nn.Linear(2, 2)) == "contiguous"
