import itertools

import pytest
import torch
from PIL import Image

from benchmarks.support.data import (
    Normalisation,
    Split,
    digits,
    folder_title,
    image_folder,
)
from benchmarks.support.models import CIFAR_INPUT, IMAGENET_INPUT


def numbered(n: int) -> Split:
    """n one-pixel images that hold their own position."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    return Split(images, torch.arange(n), Normalisation(1.0, (0.0,), (1.0,)))


def test_unlabelled_batches_are_drawn_without_replacement():
    batches = numbered(10).unlabelled(7, batch_size=4, seed=0)
    assert [len(batch) for batch in batches] == [4, 3]
    values = torch.cat(batches).flatten().tolist()
    assert len(set(values)) == 7
    assert values != sorted(values)
    assert torch.cat(numbered(10).unlabelled(99, batch_size=4, seed=0)).numel() == 10


def test_digits_are_split_the_same_way_every_time():
    first, again = digits(), digits()
    assert (len(first.train), len(first.val)) == (1257, 540)
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.val.labels, again.val.labels)


def test_digits_are_normalised_and_every_class_is_on_both_sides():
    data = digits()
    x, _ = data.train.at(slice(None))
    assert x.shape == (1257, 1, 8, 8)
    assert abs(float(x.mean())) < 0.05
    assert float(x.std()) == pytest.approx(1, abs=0.05)
    for split in (data.train, data.val):
        assert split.labels.unique().tolist() == list(range(10))


def test_in_order_yields_every_image_once():
    labels = torch.cat([y for _, y in numbered(10).in_order(4)])
    assert labels.tolist() == list(range(10))


def test_shuffled_batches_are_full_seeded_and_cover_the_images():
    batches = [y.tolist() for _, y in numbered(10).shuffled(4, steps=5, seed=0)]
    assert [len(batch) for batch in batches] == [4] * 5
    drawn = list(itertools.chain(*batches))
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert batches == [y.tolist() for _, y in numbered(10).shuffled(4, steps=5, seed=0)]
    assert batches != [y.tolist() for _, y in numbered(10).shuffled(4, steps=5, seed=1)]


def test_a_batch_may_be_larger_than_the_split():
    (batch,) = [y for _, y in numbered(3).shuffled(8, steps=1, seed=0)]
    assert len(batch) == 8


def test_image_folder_reads_classes_in_alphabetical_order(folder):
    data = image_folder(folder, CIFAR_INPUT)
    assert (data.title, data.classes) == ("colours", 2)
    assert (len(data.train), len(data.val)) == (6, 4)
    assert data.train.images.shape == (6, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8
    blue, red = 2, 0
    brightest = data.val.images.float().mean((2, 3)).argmax(1)
    assert brightest.tolist() == [blue if label == 0 else red for label in data.val.labels]


def test_image_folder_normalises_as_imagenet_does(folder):
    data = image_folder(folder, CIFAR_INPUT)
    x, _ = data.val.at(slice(0, 1))
    expected = (float(data.val.images[0, 1, 5, 7]) / 255 - 0.456) / 0.224
    assert float(x[0, 1, 5, 7]) == pytest.approx(expected, rel=1e-5)


def test_image_folder_decodes_only_what_is_asked_for(folder):
    for path in sorted((folder / "train").rglob("*.png")):
        path.write_bytes(b"broken")
    data = image_folder(folder, CIFAR_INPUT, train_images=0, val_images=3)
    assert (len(data.train), len(data.val)) == (0, 3)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        image_folder(folder, CIFAR_INPUT, train_images=1)


def test_the_images_drawn_follow_the_seed(folder):
    draws = [
        image_folder(folder, CIFAR_INPUT, train_images=3, seed=seed).train.images
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_other_sizes_are_resized_and_cropped_to_the_centre(folder):
    wide = Image.new("RGB", (400, 200), "black")
    wide.paste("white", (100, 0, 300, 200))
    wide.save(folder / "val" / "red" / "0.png")
    data = image_folder(folder, IMAGENET_INPUT, train_images=0)
    assert data.val.images.shape == (4, 3, 224, 224)
    assert int(data.val.images[2].min()) > 200  # only the white middle is left


@pytest.mark.parametrize(
    "name, title",
    [
        ("cifar10-jpeg", "CIFAR-10 (JPEG)"),
        ("cifar100", "CIFAR-100"),
        ("my-flowers", "my-flowers"),
    ],
)
def test_folder_titles(tmp_path, name, title):
    assert folder_title(tmp_path / name) == title


def test_a_missing_split_is_named(folder):
    (folder / "val").rename(folder / "test")
    with pytest.raises(ValueError, match=r"no folder .*val; expected FOLDER/train"):
        image_folder(folder, CIFAR_INPUT)


def test_a_split_without_classes_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train has no class folders"):
        image_folder(tmp_path, CIFAR_INPUT)


def test_splits_of_different_classes_are_refused(folder):
    (folder / "val" / "red").rename(folder / "val" / "green")
    with pytest.raises(ValueError, match="different classes: green, red only"):
        image_folder(folder, CIFAR_INPUT)


def test_a_class_without_images_is_named(folder):
    for path in (folder / "train" / "red").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="red has no images"):
        image_folder(folder, CIFAR_INPUT)
