"""What a batch norm is, why one cannot be folded, and what is left of it once it is."""

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from tdecomp.model.weights import is_lazy

# Classes of packages that need not be installed, recognised by their names: one whose statistics
# never change, and one that applies a dropout and an activation after it.
_FROZEN = ("torchvision", "FrozenBatchNorm2d")
_WITH_ACTIVATION = ("timm", "BatchNormAct2d")


def is_batchnorm(module: nn.Module) -> bool:
    """Whether it normalises each channel by statistics of batches."""
    return isinstance(module, _BatchNorm) or _class_of(module, _FROZEN) is not None


def why_it_stays(norm: nn.Module) -> str | None:
    """Why a batch norm cannot be folded into any layer, as far as itself tells; None if it can."""
    if parametrize.is_parametrized(norm):
        return "parametrized: bake it in with remove_parametrizations"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "it has hooks of its own, which would be lost: remove them first"
    if is_lazy(norm):
        return "lazy: run the model once so that its sizes are known"
    known = [_BatchNorm, nn.SyncBatchNorm, *map(_known, [norm])]
    if "forward" in vars(norm) or type(norm).forward not in (k.forward for k in known if k):
        return f"{type(norm).__name__} overrides forward"
    if norm.running_mean is None:
        return "it has no running statistics: it takes those of each batch"
    if norm.get_buffer("running_mean").is_meta:
        return "on the meta device, without values"
    normalises = isinstance(norm, _BatchNorm) and norm.training
    return "in train mode" if normalises else None


def rest_of(norm: nn.Module, *, copied: bool) -> nn.Module:
    """What stands in the place of a batch norm that is folded: its activation, or an identity."""
    rest: nn.Module = nn.Identity()
    if _class_of(norm, _WITH_ACTIVATION) is not None:
        kept = norm.get_submodule("drop"), norm.get_submodule("act")
        rest = nn.Sequential(*(copy.deepcopy(kept) if copied else kept))
    rest.training = norm.training
    return rest


def _known(norm: nn.Module) -> type[nn.Module] | None:
    return _class_of(norm, _FROZEN) or _class_of(norm, _WITH_ACTIVATION)


def _class_of(module: nn.Module, known: tuple[str, str]) -> type[nn.Module] | None:
    """The class of this package and name that it has, its own or a base."""
    for base in type(module).__mro__:
        if (base.__module__.partition(".")[0], base.__name__) == known:
            return base
    return None
