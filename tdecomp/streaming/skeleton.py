"""What a checkpoint's model is, as plain data: its layers, and the tensors that they are stored as.

The model itself is only looked at on the meta device, without any values, and can be forgotten
afterwards, with the library that it comes from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from tdecomp.files.shards import Stored
from tdecomp.files.typed import typed
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.fused import with_parts

_SUFFIX = ".weight"


@dataclass(frozen=True)
class Recipe:
    """How the values of a parameter are read.

    Attributes
    ----------
    parts : tuple of tuple of str
        The names of stored tensors: a single one; or those of each part are stacked along a new
        first dimension, and the parts joined along the second.
    transposed : bool
        Whether the last two dimensions are then exchanged.
    wide : bool
        Whether the model has them in float32 although they are stored in fewer bits.
    """

    parts: tuple[tuple[str, ...], ...]
    stacked: bool = False
    transposed: bool = False
    wide: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All stored tensors that it reads."""
        return tuple(name for part in self.parts for name in part)


@dataclass(frozen=True)
class Held:
    """A parameter of the model.

    Attributes
    ----------
    shape : tuple of int
    recipe : Recipe or None
        None where it is not known how to read it; `reason` then says why.
    copies : tuple of str
        Stored tensors with the same values, as of a tied weight that is stored twice.
    kept : bool
        Whether something that is no layer holds it, too, so that it stays where it is stored.
    """

    shape: tuple[int, ...]
    recipe: Recipe | None
    reason: str | None = None
    copies: tuple[str, ...] = ()
    kept: bool = False


@dataclass(frozen=True)
class SkeletonSite:
    """A row of the model, as `tdecomp.model.sites.Site` has it, without a module.

    `parameters` are places in `Skeleton.parameters`, by the names that they have in the module.
    `opened` is the name of the module around it whose own weights became layers, if there is one.
    """

    names: tuple[str, ...]
    spec: LayerSpec | None
    reason: str | None
    tied: tuple[str, ...]
    parameters: dict[str, int]
    opened: str | None = None


@dataclass(frozen=True)
class Skeleton:
    """The rows of a model, its parameters, and how many numbers these have.

    `arranged` are, by their names in the model, the tensors that are stored under other names or
    in several parts.
    """

    architecture: str | None  # the class of transformers; None if no library knows the model
    sites: tuple[SkeletonSite, ...]
    parameters: tuple[Held, ...]
    params: int
    arranged: dict[str, Recipe] = field(default_factory=dict)
    later: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `Skeleton.from_dict` brings it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> "Skeleton":
        """The inverse of `to_dict`, also after a round trip through JSON."""
        found: Skeleton = typed(cls, data, "skeleton")
        return found


def of_names(tensors: Mapping[str, Stored]) -> Skeleton:
    """The rows of a model that no library knows: its matrices named `*.weight` are Linear layers.

    Which of them really are, the user's `include` has to say.
    """
    sites: list[SkeletonSite] = []
    parameters: list[Held] = []

    def held(name: str) -> int:
        parameters.append(Held(tensors[name].shape, Recipe(((name,),))))
        return len(parameters) - 1

    for name, stored in tensors.items():
        if sum(size > 1 for size in stored.shape) < 2:
            continue
        layer = name.removesuffix(_SUFFIX)
        spec, own = None, {"weight": held(name)}
        reason: str | None = f"only matrices named *{_SUFFIX} are taken for Linear layers"
        if len(stored.shape) == 2 and name.endswith(_SUFFIX):
            out, into = stored.shape
            bias = tensors.get(f"{layer}.bias")
            has_bias = bias is not None and bias.shape == (out,) and bias.dtype == stored.dtype
            spec = with_parts(LayerSpec(into, out, bias=has_bias), [layer])
            reason = None
            if has_bias:
                own["bias"] = held(f"{layer}.bias")
        sites.append(SkeletonSite((layer,), spec, reason, (), own))
    params = sum(stored.numel for stored in tensors.values())
    return Skeleton(None, tuple(sites), tuple(parameters), params)


def quantized(tensors: Mapping[str, Stored], names: Sequence[str]) -> str | None:
    """The reason if any of these is stored in another form than numbers of 2 bytes or more."""
    for name in names:
        dtype = tensors[name].torch_dtype
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            return f"quantized: {name!r} is stored as {tensors[name].dtype}, and copied as it is"
    return None
