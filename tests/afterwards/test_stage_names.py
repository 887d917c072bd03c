"""Which layers there are to adapt, by the names that the original had."""

import pytest
from torch import nn

import tdecomp
from tdecomp import stage_names


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.conv = nn.Conv2d(4, 8, 3)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(16, 4)
        self.same = self.layers[0].q_proj


@pytest.fixture
def model():
    methods = ["svd", "tucker2"]
    return tdecomp.decompose(Net(), methods, rank=0.25, exclude="head", progress=False).model


FIRST = ["layers.0.q_proj.0", "layers.0.q_proj.1"]
SECOND = ["layers.1.q_proj.0", "layers.1.q_proj.1"]
CONV = ["conv.0", "conv.1", "conv.2"]


@pytest.mark.parametrize(
    "names, found",
    [
        ("q_proj", FIRST + SECOND),
        (["q_proj"], FIRST + SECOND),
        ("layers.1.q_proj", SECOND),
        ("layers.*.q_proj", FIRST + SECOND),
        (["same"], FIRST),
        (["conv", "1.q_proj"], SECOND + CONV),
        ("head", ["head"]),
        ("layers.0", [*FIRST, "layers.0.k_proj.0", "layers.0.k_proj.1"]),
    ],
)
def test_names_of_the_original(model, names, found):
    assert stage_names(model, names) == found
    for name in found:
        assert isinstance(model.get_submodule(name), (nn.Linear, nn.Conv2d))


def test_all_of_them(model):
    found = stage_names(model)
    assert found[:2] == FIRST
    assert found[-4:] == [*CONV, "head"]
    assert len(found) == len(set(found)) == 12
    assert stage_names(Net()) == [
        *(f"layers.{i}.{part}_proj" for i in (0, 1) for part in "qk"), "conv", "head",
    ]  # fmt: skip


def test_names_that_are_none(model):
    with pytest.raises(ValueError, match=r"stage_names: 'q_porj' matches no .* 'q_proj'"):
        stage_names(model, ["q_proj", "q_porj"])
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got list"):
        stage_names(["q_proj"])
    for wrong in (3, [3]):
        with pytest.raises(TypeError, match=r"expected names of layers, got"):
            stage_names(model, wrong)


def test_a_chain_without_a_layer(model):
    model.conv = tdecomp.Chain(nn.LayerNorm(4))
    assert not any(name.startswith("conv") for name in stage_names(model))
    with pytest.raises(ValueError, match=r"names only chains of modules of their own \('conv'\)"):
        stage_names(model, "conv")
