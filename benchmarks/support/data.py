"""Labelled images, kept as uint8 and normalised batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from benchmarks.support.models import InputFormat

# Those of torchvision's ImageFolder.
IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
KNOWN_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}


@dataclass(frozen=True)
class Normalisation:
    """(pixel / peak - mean) / std, for each channel."""

    peak: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return (images.float() / self.peak - mean) / std


DIGITS_NORMALISATION = Normalisation(16.0, (0.3,), (0.38,))


@dataclass(frozen=True)
class Split:
    """Images (n, channels, side, side), in uint8 where they are normalised, and labels (n,)."""

    images: Tensor
    labels: Tensor
    normalise: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return the model's inputs and the labels at some positions."""
        return self.normalise(self.images[index]), self.labels[index]

    def unlabelled(self, count: int, batch_size: int, seed: int) -> list[Tensor]:
        """Draw `count` images, or all there are, as batches of inputs without their labels."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return list(self.normalise(self.images[chosen]).split(batch_size))

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every image once, in batches."""
        for start in range(0, len(self), batch_size):
            yield self.at(slice(start, start + batch_size))

    def shuffled(self, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `steps` full batches, reshuffling whenever the images are used up."""
        generator = torch.Generator().manual_seed(seed)
        pool = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            while len(pool) < batch_size:
                pool = torch.cat([pool, torch.randperm(len(self), generator=generator)])
            yield self.at(pool[:batch_size])
            pool = pool[batch_size:]


@dataclass(frozen=True)
class Dataset:
    """What a model is fine-tuned on and what it is judged by."""

    title: str
    classes: int
    train: Split
    val: Split


def digits() -> Dataset:
    """scikit-learn's handwritten digits: 1257 to train on, 540 to judge by, always the same."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.uint8)
    x_train, x_val, y_train, y_val = train_test_split(
        images, labels, test_size=0.3, random_state=0, stratify=labels
    )

    def split(x: np.ndarray, y: np.ndarray) -> Split:
        return Split(torch.from_numpy(x), torch.from_numpy(y).long(), DIGITS_NORMALISATION)

    return Dataset("handwritten digits", 10, split(x_train, y_train), split(x_val, y_val))


def image_folder(
    root: Path,
    image_format: InputFormat,
    *,
    train_images: int | None = None,
    val_images: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Read `root/train/<class>/*` and `root/val/<class>/*`, decoding only the images asked for.

    They are drawn at random from all of a split; None stands for all of them. The seed draws those
    to train on; those to judge by are always the same.
    """
    classes = _classes(root / "train")
    other = set(classes) ^ set(_classes(root / "val"))
    if other:
        raise ValueError(
            f"{root}/train and {root}/val hold different classes: {', '.join(sorted(other))} "
            "only one of them"
        )
    splits = []
    normalise = Normalisation(255.0, image_format.mean, image_format.std)
    for part, limit, drawn_by in (("train", train_images, seed), ("val", val_images, 0)):
        files, labels = _files(root / part, classes)
        chosen = _choose(len(files), limit, drawn_by)
        images = _decode([files[i] for i in chosen.tolist()], image_format)
        splits.append(Split(images, labels[chosen], normalise))
    return Dataset(folder_title(root), len(classes), *splits)


def folder_title(root: Path) -> str:
    """Name the data after its folder; cifar10-jpeg is CIFAR-10 (JPEG)."""
    name, _, variant = root.resolve().name.partition("-")
    title = KNOWN_TITLES.get(name.lower())
    if title is None:
        return root.resolve().name
    return f"{title} ({variant.upper()})" if variant else title


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(
            f"no folder {folder}; expected FOLDER/train/<class>/<image> and "
            "FOLDER/val/<class>/<image>"
        )
    classes = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )
    if not classes:
        raise ValueError(f"{folder} has no class folders; expected {folder}/<class>/<image>")
    return classes


def _files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
        )
        if not found:
            raise ValueError(f"{folder / name} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels)


def _choose(available: int, limit: int | None, seed: int) -> Tensor:
    if limit is None or limit >= available:
        return torch.arange(available)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[:limit]


def _decode(files: Sequence[Path], image_format: InputFormat) -> Tensor:
    images = np.empty((len(files), image_format.side, image_format.side, 3), np.uint8)
    read = _reader(image_format)
    with ThreadPoolExecutor(max_workers=2) as pool:  # Pillow decodes outside the interpreter's lock
        for i, pixels in enumerate(pool.map(read, files)):
            images[i] = pixels
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _reader(image_format: InputFormat) -> Callable[[Path], np.ndarray]:
    def read(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return np.asarray(_fit(image.convert("RGB"), image_format))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error

    return read


def _fit(image: Image.Image, image_format: InputFormat) -> Image.Image:
    """Resize the shorter side and take the centre, as torchvision's own evaluation does."""
    side = image_format.side
    if image.size == (side, side):
        return image
    scale = (image_format.resize or side) / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))
