"""The README's table of support says what the methods take."""

import re

import pytest
from torch import nn

from tdecomp.decomposers.registry import get_decomposer, registered
from tdecomp.layers.grouped_linear import GroupedLinear
from tdecomp.layers.spec import LayerSpec
from tests.docs.pages import ROOT

TABLE = re.search(r"start:support\] -->\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
HEAD, _, *ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in TABLE[1].splitlines()
]
# What a cell says of a layer with a kernel of more than one place, of one with one, of a fused one.
WORDS = {"": (False, False, False), "1×1": (False, True, True), "✓": (True, True, True)}
WORDS["fused"] = (False, False, True)


def spec_of(name, size):
    if name.startswith("Conv"):
        transposed, dims = "Transpose" in name, int(name[-2])
        kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
        return LayerSpec.of(kind(12, 12, size))
    if name.startswith("Embedding"):
        return LayerSpec.of(getattr(nn, name)(24, 12))
    return LayerSpec.of(GroupedLinear(3, 8, 8) if "experts" in name else nn.Linear(12, 36))


def layers(title):
    if title.startswith("Conv"):
        return title.split(", ")
    return title.partition(";")[0].split(", ") if title.startswith("Embedding") else [title]


def test_every_method_has_a_column():
    assert sorted(HEAD[1:]) == sorted(registered())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_cell_is_what_the_method_says(row):
    for name in layers(row[0]):
        several, one = spec_of(name, 3), spec_of(name, 1)
        fused = LayerSpec(12, 36, parts=(12, 12, 12)) if several.kind == "Linear" else one
        for method, cell in zip(HEAD[1:], row[1:], strict=True):
            refuses = get_decomposer(method).refuses
            taken = tuple(refuses(spec) is None for spec in (several, one, fused))
            assert taken == WORDS[cell], (name, method)
