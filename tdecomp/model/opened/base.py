"""The contract of an opened module, and how a module is opened and closed again."""

from abc import abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar, Self

from torch import nn

from tdecomp.layers.chain import Chain
from tdecomp.model.weights import is_plain


class Opened(nn.Module):
    """A module that computes what it did before, with layers in the place of its own weights.

    Opening changes the class and the contents of a module where it stands, so that whatever holds
    it goes on doing so. A subclass says which modules it opens, and how to close them again.
    """

    names: ClassVar[tuple[str, ...]]  # of the layers, within the module
    closed_class: type[nn.Module]

    @classmethod
    @abstractmethod
    def opens(cls, module: nn.Module) -> bool:
        """Whether it is a module that this class opens."""

    @abstractmethod
    def open_up(self) -> None:
        """Move the weights into layers."""

    @abstractmethod
    def close_up(self) -> None:
        """Move them back, the very parameters where they are."""

    def closed_name(self, layer: str, *, bias: bool) -> str:
        """The parameter of the closed module that a layer's weight or bias is, or is a part of."""
        return f"{layer}_bias" if bias else layer

    @classmethod
    def open(cls, module: nn.Module) -> Self:
        """Open a module, which stays the same object."""
        module.closed_class, module.__class__ = type(module), cls  # type: ignore[assignment]
        assert isinstance(module, cls)
        module.open_up()
        return module

    def close(self) -> None:
        """Undo `open`; none of its layers may have been replaced."""
        self.close_up()
        self.__class__ = vars(self).pop("closed_class")


class Contents:
    """What a module consists of, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._kind = module, module.__class__
        self._own = {k: v for k, v in vars(module).items() if k not in _REGISTERED}
        self._held = {name: dict(getattr(module, name)) for name in _REGISTERED}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The module's own."""
        return {k: p for k, p in self._held["_parameters"].items() if p is not None}

    def put_back(self) -> None:
        """The class, the attributes, the parameters and the modules that there were."""
        module, own = self._module, vars(self._module)
        module.__class__ = self._kind
        for name in own.keys() - self._own.keys() - _REGISTERED.keys():
            del own[name]
        training = module.training
        own.update(self._own, training=training)
        for name, held in self._held.items():
            own[name].clear()
            own[name].update(held)


_REGISTERED = dict.fromkeys(("_parameters", "_modules"))


def close_unchanged(model: nn.Module) -> None:
    """Close what is open without need: modules in which nothing was decomposed."""
    for module in list(model.modules()):
        if isinstance(module, Opened) and not has_chains(module):
            module.close()


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A Linear with these very parameters."""
    layer = nn.Linear(1, 1, bias=False, device="meta")  # which draws no random numbers
    layer.out_features, layer.in_features = weight.shape
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer


def has_chains(module: nn.Module) -> bool:
    """Whether a layer in it was replaced."""
    return any(isinstance(part, Chain) for part in module.modules())


def own_weights(module: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """Its parameters of these names; none unless all that it has are plain ones with values."""
    found: dict[str, nn.Parameter] = {}
    for name in names:
        parameter: Any = module._parameters.get(name)
        if parameter is None:
            continue
        if not is_plain(parameter) or nn.parameter.is_lazy(parameter) or not parameter.numel():
            return {}
        found[name] = parameter
    return found
