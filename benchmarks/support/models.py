"""Models by name, with weights from a file, from torchvision or timm, or drawn at random."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.support.networks import VGG11, DigitsVGG, ResNet20
from benchmarks.support.torchvision_import import import_torchvision

DEFAULT = "DEFAULT"
TORCHVISION = "torchvision:"
TIMM = "timm:"
DIGITS_WEIGHTS = Path(__file__).parents[1] / "weights" / "digits_vgg.safetensors"

_UNREADABLE = (SafetensorError, UnpicklingError, RuntimeError, ValueError, OSError, EOFError)


@dataclass(frozen=True)
class InputFormat:
    """The images a model takes, what their shorter side is resized to before the crop, and how
    pixels between 0 and 1 are normalised."""

    channels: int
    side: int
    resize: int | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


CIFAR_INPUT = InputFormat(channels=3, side=32)
IMAGENET_INPUT = InputFormat(channels=3, side=224, resize=256)


@dataclass(frozen=True)
class Entry:
    """A model of the registry."""

    build: Callable[[], nn.Module]
    input_format: InputFormat
    default_weights: Path | None = None


MODELS: Mapping[str, Entry] = {
    "digits_vgg": Entry(DigitsVGG, InputFormat(channels=1, side=8), DIGITS_WEIGHTS),
    "resnet20": Entry(ResNet20, CIFAR_INPUT),
    "vgg11_bn": Entry(VGG11, CIFAR_INPUT),
}


def input_format(name: str) -> InputFormat:
    """The images that the named model takes; a ValueError for an unknown name lists the others."""
    if name.startswith(TIMM):
        return _timm_format(name.removeprefix(TIMM))
    return IMAGENET_INPUT if name.startswith(TORCHVISION) else _entry(name).input_format


def load_model(name: str, weights: str | None = None, *, seed: int = 0) -> nn.Module:
    """Build a model in eval mode.

    `weights` is a file (safetensors, or a state dict saved by torch), "DEFAULT" for the weights
    that come with the model, or None: the model's own if it ships with any, else random ones from
    `seed`.
    """
    torch.manual_seed(seed)
    if name.startswith(TORCHVISION):
        model = _torchvision_model(name.removeprefix(TORCHVISION), weights)
    elif name.startswith(TIMM):
        model = _timm_model(name.removeprefix(TIMM), weights)
    else:
        model = _own_model(name, weights)
    return model.eval()


def _entry(name: str) -> Entry:
    if name not in MODELS:
        names = ", ".join(MODELS)
        raise ValueError(
            f"unknown model {name!r}; there are {names}, {TORCHVISION}NAME and "
            f"{TIMM}NAME, or FILE.py"
        )
    return MODELS[name]


def _own_model(name: str, weights: str | None) -> nn.Module:
    entry = _entry(name)
    model = entry.build()
    if weights in (None, DEFAULT):
        if entry.default_weights is not None:
            _load_into(model, name, entry.default_weights)
        elif weights == DEFAULT:
            raise ValueError(f"{name} ships without weights; give a file instead of {DEFAULT}")
    else:
        _load_into(model, name, Path(str(weights)))
    return model


def _torchvision_model(name: str, weights: str | None) -> nn.Module:
    models = import_torchvision().models
    known: list[str] = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"torchvision has no classifier {name!r}; it has {', '.join(known)}")
    if weights == DEFAULT:
        try:
            pretrained: nn.Module = models.get_model(name, weights=DEFAULT)
        except OSError as error:
            raise _not_downloaded(TORCHVISION + name, error) from error
        return pretrained
    # Inception and GoogLeNet return a tuple in training mode unless their auxiliary heads are off.
    options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return _with_weights(partial(models.get_model, name, weights=None, **options), name, weights)


def _timm() -> ModuleType:
    try:
        import_torchvision()  # timm imports it, with what its operators need
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(
            f"{TIMM}NAME needs timm and torchvision: pip install timm ({error})"
        ) from error


def _timm_format(name: str) -> InputFormat:
    """What timm says of the model's own weights."""
    cfg = _timm().get_pretrained_cfg(name)
    if cfg is None:
        return IMAGENET_INPUT
    channels, side, _ = cfg.input_size
    return InputFormat(channels, side, round(side / cfg.crop_pct), cfg.mean, cfg.std)


def _timm_model(name: str, weights: str | None) -> nn.Module:
    timm = _timm()
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"{name[:4]}*")[:20])
        raise ValueError(f"timm has no model {name!r}; of similar names it has {near or 'none'}")
    if weights == DEFAULT:
        try:
            pretrained: nn.Module = timm.create_model(name, pretrained=True)
        except Exception as error:  # of whatever fetches them
            raise _not_downloaded(TIMM + name, error) from error
        return pretrained
    return _with_weights(partial(timm.create_model, name), name, weights)


def _not_downloaded(name: str, error: Exception) -> ValueError:
    return ValueError(f"the weights of {name} cannot be downloaded ({error}); give a file")


def _with_weights(build: Callable[..., nn.Module], name: str, weights: str | None) -> nn.Module:
    """The model with the weights of a file, and with as many classes as these are for."""
    model = build()
    if weights is not None:
        state = read_state_dict(Path(weights))
        classes = _classes_of(state, model)
        if classes is not None:
            model = build(num_classes=classes)
        _load_into(model, name, Path(weights), state)
    return model


def _classes_of(state: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """How many classes the weights are for: their size where the library's model has 1000."""
    for name, parameter in model.named_parameters():
        if parameter.shape[0] == 1000 and name in state and state[name].dim() > 0:
            return state[name].shape[0]
    return None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, or from one written by `torch.save`."""
    if not path.is_file():
        raise ValueError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as weights: {error}") from error
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(f"{path} holds no state dict: expected a dict of names and tensors")
    return state


def _load_into(
    model: nn.Module, name: str, path: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Load weights of any floating dtype; parameters keep the model's float32."""
    try:
        model.load_state_dict(read_state_dict(path) if state is None else state)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit {name}: {error}") from error
