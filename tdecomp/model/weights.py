"""What counts as a layer, and which parameters of a model have a row in reports."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy as is_lazy_parameter
from torch.nn.utils import parametrize

from tdecomp.layers.spec import LayerSpec, kind_of

# Packages whose layers store their weights in some other way.
_QUANTIZERS = (
    "bitsandbytes",
    "optimum",
    "quanto",
    "torchao",
    "hqq",
    "awq",
    "auto_gptq",
    "gptqmodel",
)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is of a known kind or similar to one: it has a row in every report."""
    return kind_of(module) is not None or isinstance(module, _ConvNd) or is_quantized(module)


def spec_of(module: nn.Module) -> LayerSpec | None:
    """The sizes of a layer, None where they are not known."""
    known = kind_of(module) is not None and not is_lazy(module) and not is_quantized(module)
    return LayerSpec.of(module) if known else None


def is_lazy(module: nn.Module) -> bool:
    """Whether a module has no sizes yet: it takes those of its first inputs."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def is_plain(tensor: Tensor) -> bool:
    """Whether its values are those of an ordinary tensor, not of a class as quantizers have."""
    return type(tensor.data) in (Tensor, nn.Parameter)


def refuse_lazy(model: nn.Module, caller: str) -> None:
    """Raise a ValueError for a model that a forward pass would change: it gives layers sizes."""
    for name, module in model.named_modules():
        if is_lazy(module):
            raise ValueError(
                f"{caller}: layer {name!r} is lazy, so that a forward pass would change the model; "
                "expected one whose sizes are known: run it once first"
            )


def is_quantized(module: nn.Module) -> bool:
    """Whether its weight is stored by a quantizer, in torch or one of the known packages."""
    kind = type(module)
    named = kind.__name__.startswith(("Linear", "Conv")) and "Packed" not in kind.__name__
    package = kind.__module__.partition(".")[0]
    stored = "weight" in module._parameters and package in _QUANTIZERS
    return stored or (named and "quantized" in kind.__module__)


@dataclass(frozen=True)
class Weights:
    """The parameters that one row stands for: a layer's, or one of a module that is no layer."""

    names: list[str]  # "" is the model itself
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]

    def __str__(self) -> str:
        shapes = ["×".join(map(str, p.shape)) for p in self.parameters if _is_matrix(p)]
        return f"{type(self.module).__name__}({', '.join(shapes)})"


def weights_of(model: nn.Module) -> list[Weights]:
    """Every layer of a known kind and every other weight of two or more dimensions, in order."""
    found: dict[tuple[nn.Module, str], Weights] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for part, parameters in _parts(module).items():
            weights = found.setdefault((module, part), Weights([], module, parameters))
            weights.names.append(".".join(filter(None, (path, part))))
    return list(found.values())


def _parts(module: nn.Module) -> dict[str, tuple[nn.Parameter, ...]]:
    """The parameters of each row of a module, by what the row's name adds to the module's."""
    if isinstance(module, parametrize.ParametrizationList):
        return {}  # its module counts them
    own = dict(module.named_parameters(recurse=False))
    if isinstance(computed := getattr(module, "parametrizations", None), nn.ModuleDict):
        own |= dict(computed.named_parameters())
    if is_layer(module) or isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return {"": tuple(own.values())}
    matrices = {name: p for name, p in own.items() if _is_matrix(p)}
    if any(name.partition(".")[0] == "weight" for name in matrices):
        return {"": tuple(own.values())}
    return {name: (parameter,) for name, parameter in matrices.items()}


def _is_matrix(parameter: nn.Parameter) -> bool:
    return not is_lazy_parameter(parameter) and sum(size > 1 for size in parameter.shape) > 1
