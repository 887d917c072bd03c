"""Groups of layers whose sums fit into a limit of memory."""

import pytest
import torch
from torch import nn

from tdecomp.calibration.calibrate import calibrate
from tests.calibration.small_model import check_same, images, small, taken, whole
from tests.unchanged import unchanged


def test_layers_in_groups_see_the_same(capsys):
    batches = list(images(12).split(4))
    plain = taken(small(), batches)
    limit = 8 * 54 * 55
    calls = []

    def counted(model, batch):
        calls.append(len(batch))
        return model(batch)

    with unchanged(model := small()):
        grouped = calibrate(model, whole(batches, max_memory=limit), forward=counted)
    assert "calibrate 3/3" in capsys.readouterr().err
    # Once to count patches, then with and without gradients.
    assert len(calls) == 3 + 3 * 2 * 3
    check_same(grouped, plain, bound=1e-12)
    assert grouped.samples == plain.samples == 12
    assert grouped.peak_bytes < plain.peak_bytes
    assert grouped.peak_bytes <= limit


@pytest.mark.parametrize("sizes", [(1, 2000, 3), (2000, 1), (1, 1, 1, 1), (300, 299)])
@pytest.mark.parametrize("limit", [10**5, 10**6, 3 * 10**6, 10**7])
def test_the_limit_is_kept_whatever_batch_comes_first(sizes, limit):
    model = nn.Sequential(nn.Linear(600, 4), nn.Linear(4, 500), nn.Linear(500, 3))
    batches = [torch.randn(size, 600) for size in sizes]
    count = sum(sizes)
    largest = 600 * (8 + (4 * count if count < 600 else 8 * 600))
    if largest > limit:
        with pytest.raises(ValueError, match=f"layer '0' .*alone needs {largest:,} bytes"):
            taken(model, batches, max_memory=limit, gradients=False)
    else:
        assert taken(model, batches, max_memory=limit, gradients=False).peak_bytes <= limit


def test_enough_memory_takes_one_pass(capsys):
    calibrate(small(), whole([images()], max_memory=10**6))
    assert "calibrate: 100%" in capsys.readouterr().err


def test_rows_need_less_than_a_matrix():
    model, x = nn.Linear(1000, 4), torch.ones(10, 1000)
    assert taken(model, [x, x], max_memory=100_000)[""].count == 20
    with pytest.raises(ValueError, match=r"layer '' .*alone needs 8,008,000 bytes"):
        taken(model, [torch.ones(1000, 1000)], max_memory=100_000)
    with pytest.raises(ValueError, match=r"layer '' .*alone needs 168,000 bytes"):
        taken(model.double(), [x.double(), x.double()], max_memory=100_000)


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(ValueError, match=r"layer '2' .*needs 23,760 bytes; .*got 10,000"):
        taken(small(), [images()], max_memory=10_000)


def test_groups_need_batches_that_can_be_gone_through_again():
    with pytest.raises(ValueError, match="max_memory goes through the batches more than once"):
        taken(small(), (x for x in [images()]), max_memory=10**6)
