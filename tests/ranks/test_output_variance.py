"""OutputVariance against the definition, on candidates made by hand and on layers."""

import math

import pytest

from tdecomp.layers.cost import Cost
from tdecomp.ranks.base import Candidate
from tdecomp.ranks.output_variance import OutputVariance
from tdecomp.ranks.short_forms import get_selector


def candidate(max_rank, errors=None, fits=None, *, by_outputs=True, layer="conv"):
    """A method with these errors at rank 0, 1, 2 …, or of these fits by rank."""
    return Candidate(
        layer,
        "method",
        max_rank,
        Cost(100),
        lambda rank: Cost(math.prod(rank) if isinstance(rank, tuple) else rank),
        lambda: None,
        errors=lambda: errors,
        error_at=fits or pytest.fail,
        by_outputs=by_outputs,
    )


def chosen(share, *args, **options):
    (choice,) = OutputVariance(share).select([[candidate(*args, **options)]])
    return choice


ERRORS = [1.0, 0.5, 0.2, 0.05, 1e-13]


@pytest.mark.parametrize(
    "share, rank", [(0.1, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (0.95, 3), (0.96, 4), (1, 4)]
)
def test_nested_methods_are_exact_and_need_no_fit(share, rank):
    choice = chosen(share, 4, ERRORS)
    assert choice.rank == rank
    assert choice.error == ERRORS[rank]


def test_others_are_found_by_bisection_with_few_fits():
    for share in (0.05, 0.5, 0.93, 0.999):
        fits = []

        def error_at(rank, fits=fits):
            fits.append(rank)
            return (1 - rank / 1000) ** 2

        choice = chosen(share, 1000, fits=error_at)
        wanted = next(r for r in range(1, 1001) if (1 - r / 1000) ** 2 <= 1 - share + 1e-9)
        assert choice.rank == wanted
        assert choice.error == (1 - wanted / 1000) ** 2
        assert len(fits) == len(set(fits)) <= 10


def test_ranks_of_a_tuple_grow_together():
    choice = chosen(0.5, (8, 16), fits=lambda rank: 1 - math.prod(rank) / 128)
    assert choice.rank == (6, 12)
    assert choice.error == pytest.approx(1 - 72 / 128)
    assert chosen(1.0, (8, 16), fits=lambda rank: 1 - math.prod(rank) / 128).rank == (8, 16)


def test_a_fit_that_fails_keeps_nothing():
    choice = chosen(0.5, 8, fits=lambda rank: None if rank < 6 else 0.1)
    assert choice.rank == 6


def test_a_share_that_no_rank_keeps_leaves_the_layer_alone_with_the_numbers():
    choice = chosen(0.95, 8, fits=lambda rank: 1 - rank / 10)
    assert choice.candidate is None
    assert choice.reason == (
        "no rank of method keeps 95.0% of the output variance: its largest, 8, keeps 80.0%"
    )
    for failed in (None, math.inf):
        reason = chosen(0.95, 8, fits=lambda _, failed=failed: failed).reason
        assert "its largest, 8, could not be fitted" in reason
    # A chain that is reduced: errors are known beyond the rank that it has.
    assert "its largest, 2, keeps 80.0%" in chosen(0.95, 2, ERRORS).reason


def test_a_layer_whose_outputs_are_not_known_is_left_alone():
    sites = [[candidate(4, ERRORS)], [candidate(4, ERRORS, by_outputs=False, layer="up")]]
    known, unknown = OutputVariance(0.8).select(sites)
    assert known.rank == 2
    assert unknown.candidate is None
    assert "no batch reached the layer" in unknown.reason


def test_without_data_it_says_what_is_missing():
    sites = [[candidate(4, ERRORS, by_outputs=False, layer=f"l{i}")] for i in range(5)]
    with pytest.raises(ValueError, match=r"OutputVariance\(share=0.9\): nothing is known") as error:
        OutputVariance(0.9).select(sites)
    for part in ("'l0', 'l1', 'l2' and 2 more", "data=...", "Moments", "Energy"):
        assert part in str(error.value)
    assert OutputVariance(0.9).select([]) == []


def test_the_first_method_decides():
    site = [candidate(4, ERRORS), candidate(4, [1.0, 0.0, 0.0, 0.0, 0.0])]
    (choice,) = OutputVariance(0.9).select([site])
    assert (choice.candidate, choice.rank) == (site[0], 3)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, math.nan, True, "0.5", None])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match="expected a share above 0 and at most 1, got"):
        OutputVariance(share)


def test_it_is_taken_as_a_rank():
    selector = OutputVariance(0.95)
    assert get_selector(selector) is selector
    assert get_selector({"features.*": selector}).selectors == {"features.*": selector}
