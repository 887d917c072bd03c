"""What is compared: a model by name or from a .py file, its data, and how it is judged."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.support.data import Dataset, Split, digits, image_folder
from benchmarks.support.models import DEFAULT, InputFormat, input_format, load_model
from tdecomp import flip_and_shift

DIGITS = "digits_vgg"
ACCURACY = "accuracy (%)"
_LABELS_ARE = (
    "expected batches (inputs, labels), each a tensor, as a DataLoader yields them; a model of "
    "several inputs can be wrapped in a module that takes one"
)


@dataclass(frozen=True)
class Subject:
    """A model, the data that a seed draws, and what is measured on it."""

    name: str
    weights: str
    model: nn.Module
    title: str  # the data's
    inputs: Callable[[int], Tensor]  # as many as are asked for, to time the model with
    data: Callable[[int], Dataset] | None = None
    judged: int = 0  # the number of samples that quality is measured on
    augment: Callable[[Any, torch.Generator], Any] | None = None
    metric: Callable[[nn.Module], float] | None = None  # higher is better; otherwise accuracy
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy

    @property
    def measure(self) -> str:
        return ACCURACY if self.metric is None else "metric"


def named_subject(
    name: str,
    weights: str | None,
    folder: Path | None,
    *,
    train_images: int,
    val_images: int | None,
    seed: int,
) -> Subject:
    """A model of this package, torchvision's or timm's, on a folder of images where there is one.

    The seed is that of random weights. A ValueError says what is missing or does not fit.
    """
    images = input_format(name)
    if name == DIGITS and folder is not None:
        raise ValueError(f"{name} takes 8×8 digits and brings them; leave out --data")
    model = load_model(name, weights, seed=seed)
    known = "random"
    if weights is not None or name == DIGITS:
        known = f"{Path(weights or DEFAULT).name} {_digest(model)}"
    if name == DIGITS:
        own = digits()
        inputs = partial(_first, own.val)
        return Subject(name, known, model, own.title, inputs, lambda _seed: own, len(own.val))
    if folder is None:
        drawn = partial(_noise, images, seed)
        return Subject(name, known, model, "random images", drawn)

    def draw(seed: int) -> Dataset:
        return image_folder(
            folder, images, train_images=train_images, val_images=val_images, seed=seed
        )

    data = image_folder(folder, images, train_images=0, val_images=val_images)
    _check_classes(name, model, data, folder)
    inputs = partial(_first, data.val)
    return Subject(
        name, known, model, data.title, inputs, draw, len(data.val), augment=flip_and_shift
    )


def subject_of_file(path: Path, *, train_images: int, val_images: int | None) -> Subject:
    """A .py file with `model()`, `data()` and, if it is not accuracy, `metric(model)`.

    `data()` gives batches to train on and batches to judge by, both `(inputs, labels)`;
    `loss(outputs, labels)`, if there is one, is what fine-tuning makes small. A ValueError says
    what the file lacks.
    """
    module = _executed(path)
    missing = [name for name in ("model", "data") if not callable(getattr(module, name, None))]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}(); expected model(), data() and metric()")
    model = module.model()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path}: model() gave a {type(model).__name__}, expected an nn.Module")
    both = module.data()
    if not isinstance(both, (tuple, list)) or len(both) != 2:
        raise ValueError(f"{path}: data() gave {type(both).__name__}, expected (train, val)")
    train, val = (
        _joined(batches, limit, f"{path}: data()")
        for batches, limit in zip(both, (train_images, val_images), strict=True)
    )
    own = Dataset(path.stem, 0, train, val)
    _check_outputs(path, model.eval(), val, judged_by_accuracy=not hasattr(module, "metric"))
    inputs = partial(_first, val)
    return Subject(
        path.stem, f"own {_digest(model)}", model, own.title, inputs, lambda _seed: own, len(val),
        metric=getattr(module, "metric", None),
        loss=getattr(module, "loss", nn.functional.cross_entropy),
    )  # fmt: skip


def _digest(model: nn.Module) -> str:
    """A few characters that tell these weights from others of the same file's name."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:8]


def _check_outputs(path: Path, model: nn.Module, val: Split, *, judged_by_accuracy: bool) -> None:
    """A ValueError if what the model gives cannot be compared, or not with the labels."""
    x, y = val.at(slice(0, 1))
    with torch.inference_mode():
        outputs = model(x)
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"{path}: the model gave a {type(outputs).__name__}, expected a tensor; wrap it in a "
            "module that returns one"
        )
    classes = outputs.dim() == 2 and y.dim() == 1 and not y.is_floating_point()
    if judged_by_accuracy and not classes:
        raise ValueError(
            f"{path}: outputs of shape {tuple(outputs.shape)} and labels of {y.dtype} and shape "
            f"{tuple(y.shape)} have no accuracy, which needs (n, classes) and whole numbers (n,); "
            "expected metric(model)"
        )


def _executed(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"no file {path}; expected a .py file with model(), data() and metric()")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _joined(batches: Iterable[Any], limit: int | None, where: str) -> Split:
    """The first samples of batches as one split."""
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    for batch in batches:
        if (
            not isinstance(batch, (tuple, list))
            or not all(isinstance(part, Tensor) for part in batch[:2])
            or len(batch) < 2
        ):
            got = type(batch).__name__
            if isinstance(batch, (tuple, list)):
                got += f" of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
            raise ValueError(f"{where}: got a {got}; {_LABELS_ARE}")
        inputs.append(batch[0])
        labels.append(batch[1])
        count += len(batch[1])
        if limit is not None and count >= limit:
            break
    if not inputs:
        raise ValueError(f"{where}: got no batches; {_LABELS_ARE}")
    try:
        return Split(torch.cat(inputs)[:limit], torch.cat(labels)[:limit], _as_they_are)
    except RuntimeError as error:
        raise ValueError(f"{where}: expected batches of one shape ({error})") from error


def _as_they_are(inputs: Tensor) -> Tensor:
    return inputs


def _first(split: Split, count: int) -> Tensor:
    """The first inputs, again from the start where there are fewer."""
    return split.at(torch.arange(count) % len(split))[0]


def _noise(images: InputFormat, seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, images.channels, images.side, images.side, generator=generator)


def _check_classes(name: str, model: nn.Module, data: Dataset, folder: Path) -> None:
    with torch.inference_mode():
        outputs = model(_first(data.val, 1)).shape[1]
    if outputs != data.classes:
        raise ValueError(
            f"{name} tells {outputs} classes apart, but {folder} has {data.classes} class folders"
        )
