"""What had better be done to a model before it is decomposed."""

import pytest
from torch import nn

import tdecomp

QUIET = {"progress": False, "allow_expansion": True}


class Block(nn.Module):
    """Two branches, merged into one convolution on demand, as in RepVGG."""

    def __init__(self):
        super().__init__()
        self.conv, self.pointwise = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def switch_to_deploy(self):
        del self.pointwise
        self.norm = nn.Identity()

    def forward(self, x):
        return self.norm(self.conv(x) + self.pointwise(x))


def notes(model, **options):
    result = tdecomp.decompose(model, "tucker2", rank=(2, 2), **options, **QUIET)
    plan = tdecomp.plan(model, "tucker2", rank=(2, 2), **options, **QUIET)
    found = [[note for note in each.notes if "hint" in note] for each in (plan, result.report)]
    assert found[0] == found[1]
    return found[0]


def test_branches_that_could_be_merged_before():
    model = nn.Sequential(Block(), Block(), nn.Conv2d(8, 8, 3)).eval()
    assert notes(model) == [
        "hint: 2 blocks have branches that merge into one layer exactly ('0'): merge them before "
        "decomposing, their switch_to_deploy()"
    ]
    model[0].switch_to_deploy()
    assert "1 block has branches that merge into one layer exactly ('1')" in notes(model)[0]


@pytest.mark.parametrize("why", ["merged", "not decomposed", "training", "no branches"])
def test_no_hint(why):
    model = nn.Sequential(Block(), nn.Conv2d(8, 8, 3)).eval()
    if why == "merged":
        model[0].switch_to_deploy()
    if why == "no branches":
        model[0] = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    model.train(why == "training")
    assert notes(model, **({"include": "1"} if why == "not decomposed" else {})) == []
