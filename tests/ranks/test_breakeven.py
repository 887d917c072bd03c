"""Break-even against its closed forms, and as a guard on every other selector."""

import math

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import BreakEven, Energy, Ratio
from tests.geometries import case
from tests.ranks.test_ratio import (
    LAYERS,
    METHODS,
    TAKEN,
    full_rank,
    layers_of,
    planned,
    steps,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def row_of(layer, method, x=None, rank="breakeven", **options):
    return tdecomp.plan(layer, method, rank=rank, example_inputs=x, **options)[""]


def fewest(cost_per_rank, budget):
    """The largest rank with rank · cost_per_rank < budget."""
    return math.ceil(budget / cost_per_rank) - 1


@pytest.mark.parametrize("S, T", [(16, 16), (64, 10), (7, 33), (128, 128)])
def test_svd_closed_form(S, T):
    row = row_of(nn.Linear(S, T), "svd", torch.zeros(3, S))
    assert row.rank == math.ceil(S * T / (S + T)) - 1
    row = row_of(nn.Conv2d(S, T, 1), "svd", torch.zeros(1, S, 5, 5))
    assert row.rank == math.ceil(S * T / (S + T)) - 1


@pytest.mark.parametrize("S, T, kh, kw", [(16, 16, 3, 3), (8, 30, 5, 3), (32, 9, 1, 4)])
def test_closed_forms_at_stride_one(S, T, kh, kw):
    conv, x = nn.Conv2d(S, T, (kh, kw), padding="same"), torch.zeros(2, S, 8, 8)
    F, k, macs = S * kh * kw, kh * kw, S * T * kh * kw
    assert row_of(conv, "lowrank", x).rank == math.ceil(F * T / (F + T)) - 1
    assert row_of(conv, "cp", x).rank == fewest(S + k + T, macs)
    assert row_of(conv, "cp-separable", x).rank == fewest(S + kh + kw + T, macs)


def test_a_pointwise_stage_before_a_strided_one_costs_four_times_as_much():
    S, T, out = 16, 24, 4 * 4
    conv, x = nn.Conv2d(S, T, 3, stride=2, padding=1), torch.zeros(1, S, 8, 8)
    macs = S * T * 9 * out
    assert row_of(conv, "cp", x).rank == fewest(4 * out * S + out * 9 + out * T, macs)
    # The separable one strides in one dimension after the other: 4 × 8, then 4 × 4.
    per_rank = 64 * S + 4 * 8 * 3 + out * 3 + out * T
    assert row_of(conv, "cp-separable", x).rank == fewest(per_rank, macs)
    # lowrank strides in its first stage, so nothing changes.
    assert row_of(conv, "lowrank", x).rank == math.ceil(S * 9 * T / (S * 9 + T)) - 1


def test_each_stage_of_a_transposed_layer_counts_at_its_own_size():
    S, T, k, n = 16, 12, 4, 5
    layer = nn.ConvTranspose2d(S, T, k, stride=2, padding=1)
    x = torch.zeros(1, S, n, n)
    macs = S * T * k * k * n * n  # once per input position
    # K×K at the input's size, the pointwise one at the output's, four times as large.
    assert row_of(layer, "lowrank", x).rank == fewest(S * k * k * n**2 + T * 4 * n**2, macs)
    per_rank = S * n**2 + k * k * n**2 + T * 4 * n**2
    assert row_of(layer, "cp", x).rank == fewest(per_rank, macs)


def test_without_padding_the_output_is_smaller_than_the_input():
    conv, x = nn.Conv2d(16, 16, 3), torch.zeros(1, 16, 6, 6)
    per_rank = 36 * 16 + 16 * 9 + 16 * 16
    assert row_of(conv, "cp", x).rank == fewest(per_rank, 16 * 16 * 9 * 16)


def test_every_call_counts_at_its_own_size():
    class TwoSizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3)

        def forward(self, x):
            return self.conv(x).mean() + self.conv(x[..., :4, :4]).mean()

    model = TwoSizes()
    row = tdecomp.plan(model, "cp", rank="breakeven", example_inputs=torch.zeros(1, 16, 6, 6))
    per_rank = (36 + 16) * 16 + (16 + 4) * 9 + (16 + 4) * 16
    assert row["conv"].rank == fewest(per_rank, 16 * 16 * 9 * (16 + 4))


def test_by_parameters_without_example_inputs_and_the_note_says_so():
    conv = nn.Conv2d(16, 24, 3, stride=2, bias=False)
    row = row_of(conv, "cp")
    assert row.rank == fewest(16 + 9 + 24, 16 * 24 * 9)
    assert row.note == "compared by parameters: no MACs observed"
    assert row_of(conv, "cp", torch.zeros(1, 16, 8, 8)).note is None


def test_a_bias_is_on_both_sides_of_the_parameters():
    assert row_of(nn.Linear(16, 16), "svd").rank == row_of(nn.Linear(16, 16, False), "svd").rank


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_rank_that_saves_by_brute_force(method):
    for name in layers_of(method):
        for of, options in (("macs", {}), ("params", {"example_inputs": None})):
            saving = []
            for rank in steps(full_rank(name, method)):
                other = planned(name, method, rank[0] if len(rank) == 1 else rank, **options)
                if getattr(other, f"{of}_after") < getattr(other, f"{of}_before"):
                    saving.append(other.rank)
            with case(name, of):
                row = planned(name, method, BreakEven(), **options)
                assert row.rank == (saving[-1] if saving else None)


def test_a_layer_too_small_to_save_anything_says_so_with_both_numbers():
    row = row_of(nn.Linear(2, 2), "svd", torch.zeros(5, 2))
    assert row.method is None
    assert row.reason == "no rank saves MACs: rank 1 needs 20, the layer 20"
    row = row_of(nn.Linear(2, 2), "svd")
    assert row.reason == "no rank saves parameters: rank 1 needs 6, the layer 6"


# The guard ---------------------------------------------------------------------------------------

BREAK_EVEN = math.ceil(24 * 20 / 44) - 1  # 10, of the Linear in LAYERS
GUARDED = {
    "int": BREAK_EVEN + 1,
    "fraction": 0.6,
    "of rank": Ratio(1.0, of="rank"),
    "energy": Energy(0.999),
    "by layer": {"": BREAK_EVEN + 1},
    "vbmf": tdecomp.VBMF(weaken=1.0),
}


@pytest.mark.parametrize("selector", GUARDED)
def test_a_rank_that_saves_nothing_is_refused_with_both_numbers(selector):
    layer, shape = LAYERS["linear"]
    x, rank = torch.zeros(shape), GUARDED[selector]
    row = row_of(layer, "svd", x, rank=rank)
    allowed = row_of(layer, "svd", x, rank=rank, allow_expansion=True)
    assert row.method is None
    assert row.rank is None
    assert row.macs_after == row.macs_before
    best = row_of(layer, "svd", x)
    assert row.reason == (
        f"svd at rank {allowed.rank} would not save MACs: {allowed.macs_after:,} against the "
        f"layer's {row.macs_before:,}; its best chain (svd {best.rank}) would have the relative "
        f"error {best.expected_error:.3f}"
    )
    assert allowed.method == "svd"
    assert allowed.macs_after >= allowed.macs_before


def test_equal_macs_are_no_saving():
    # 4 · 4 = 2 · (4 + 4)
    assert row_of(nn.Linear(4, 4), "svd", torch.zeros(1, 4), rank=2).method is None
    assert row_of(nn.Linear(4, 4), "svd", torch.zeros(1, 4), rank=1).method == "svd"


def test_the_guard_goes_by_parameters_without_inputs_and_says_so():
    row = row_of(LAYERS["linear"][0], "svd", rank=BREAK_EVEN + 1)
    assert "would not save parameters: 504 against the layer's 500" in row.reason
    row = row_of(LAYERS["linear"][0], "svd", rank=BREAK_EVEN)
    assert row.note == "compared by parameters: no MACs observed"


def test_the_guard_goes_by_macs_where_parameters_would_say_otherwise():
    conv = nn.Conv2d(16, 16, 3, stride=4)
    x = torch.zeros(1, 16, 16, 16)
    by_macs, by_params = row_of(conv, "tucker2", x, rank=8), row_of(conv, "tucker2", rank=8)
    assert by_params.method == "tucker2"
    assert by_macs.method is None
    assert by_macs.params_before > by_params.params_after


def test_every_method_is_guarded():
    assert {method for _, method in TAKEN} == set(METHODS)
    for name, method in TAKEN:
        layer, shape = LAYERS[name]
        full = Ratio(1.0, of="rank")
        row = row_of(layer, method, torch.zeros(shape), rank=full)
        assert (row.method is None) == ("would not save MACs" in (row.reason or ""))
