"""Variants of images: what is varied, and what is left alone."""

from collections import namedtuple

import pytest
import torch

from tdecomp import flip_and_shift
from tdecomp.calibration.augment import paste


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=6, side=16):
    return torch.arange(count * 3 * side * side, dtype=torch.float32).reshape(count, 3, side, side)


def test_each_image_is_its_own_mirrored_or_not_and_moved():
    images = pictures(64)
    varied = flip_and_shift(images, generator())
    assert varied.shape == images.shape
    mirrored = 0
    for before, after in zip(images, varied, strict=True):
        # Away from the edges there is a row of the image, at most two columns and rows off.
        inside = after[:, 4:12, 4:12]
        whole, flipped = (
            any(
                torch.equal(inside, image[:, 4 + dy : 12 + dy, 4 + dx : 12 + dx])
                for dy in range(-2, 3)
                for dx in range(-2, 3)
            )
            for image in (before, before.flip(-1))
        )
        assert whole != flipped
        mirrored += flipped
    assert 16 < mirrored < 48


def test_the_generator_alone_decides():
    state = torch.get_rng_state()
    first, second, other = (flip_and_shift(pictures(), generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_of_the_images_have_one_rectangle_of_another_one():
    images = torch.arange(64.0)[:, None, None, None].expand(64, 3, 16, 12)
    kept = images.clone()
    mixed = paste(images, generator())
    assert torch.equal(images, kept)
    changed, largest = 0, 0
    for own, image in enumerate(mixed):
        foreign = image[0] != own
        assert torch.equal(image, image[:1].expand_as(image))  # in all channels alike
        if foreign.any():
            rows, columns = foreign.any(dim=1), foreign.any(dim=0)
            assert torch.equal(foreign, rows[:, None] & columns)
            first, last = (int(i) for i in rows.nonzero()[[0, -1]])
            assert int(rows.sum()) == last - first + 1
            assert len(image[0][foreign].unique()) == 1
            changed += 1
            largest = max(largest, int(foreign.sum()))
    assert 16 < changed < 48
    assert 16 * 12 / 4 < largest <= 0.6 * 16 * 12
    assert torch.equal(paste(images, generator()), mixed)


@pytest.mark.parametrize("vary", [flip_and_shift, paste])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 3, 7, 16),
        torch.zeros(4, 3, 16),
        torch.zeros(4, 12),
        torch.zeros(4, 3, 16, 16, dtype=torch.long),
    ],
    ids=["small", "three dimensions", "vectors", "whole numbers"],
)
def test_what_is_no_image_stays(vary, tensor):
    assert vary(tensor, generator()) is tensor


def test_containers_stay_what_they_are():
    pair = namedtuple("pair", "image label")
    batch = flip_and_shift(pair(pictures(), torch.arange(6)), generator())
    assert type(batch) is pair
    assert torch.equal(batch.label, torch.arange(6))
    assert not torch.equal(batch.image, pictures())
    held = flip_and_shift({"x": [pictures()], "name": "a"}, generator())
    assert held["name"] == "a"
    assert held["x"][0].shape == pictures().shape
