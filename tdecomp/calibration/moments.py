"""The moments of all layers of a model: saved, loaded and merged."""

import json
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tdecomp.calibration.layer_moments import TENSORS, LayerMoments
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.sites import Site

_FORMAT = 1
Value = TypeVar("Value")


class FitCache:
    """Values by key, each computed at most once (twice if two threads ask at the same time)."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def get(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of a key, computed if it is not known yet."""
        if key not in self._known:
            self._known[key] = compute()
        value: Value = self._known[key]
        return value

    def known(self, key: Hashable) -> Any:
        """The value of a key if it was computed, else None."""
        return self._known.get(key)


@dataclass(eq=False, repr=False)
class Moments(Mapping[str, LayerMoments]):
    """The moments of every layer's inputs, by the layer's name.

    >>> moments = tdecomp.calibrate(model, batches)            # doctest: +SKIP
    >>> moments.save("moments.safetensors")                    # doctest: +SKIP
    >>> halves = calibrate(model, first) + calibrate(model, second)  # doctest: +SKIP

    Attributes
    ----------
    layers : dict of str to LayerMoments
    unreached : tuple of str
        Layers that no batch reached; they are fitted by their weights.
    samples : int
        The number of samples that were run.
    peak_bytes : int
        The largest memory that the sums took at a time.
    """

    layers: dict[str, LayerMoments]
    unreached: tuple[str, ...] = ()
    samples: int = 0
    peak_bytes: int = 0
    # Losses and drafts already computed, so that the next plan finds them.
    fits: FitCache = field(default_factory=FitCache, init=False)

    def __getitem__(self, name: str) -> LayerMoments:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        few = sum(layer.few for layer in self.layers.values())
        words = f"moments of {len(self)} layers from {self.samples:,} samples"
        if few:
            words += f", in {few} of them fewer than fan_in"
        if self.unreached:
            words += f", {len(self.unreached)} never reached"
        return f"<{words}; at most {self.peak_bytes / 2**20:.0f} MiB held>"

    def __add__(self, other: Any) -> "Moments":
        """The moments of both sets of batches together."""
        if not isinstance(other, Moments):
            return NotImplemented
        both = {**self.layers, **other.layers}
        for name in self.layers.keys() & other.layers.keys():
            mine, others = self.layers[name], other.layers[name]
            if mine.spec != others.spec:
                raise ValueError(
                    f"layer {name!r}: moments of {mine.spec} and of {others.spec} cannot be "
                    "merged; expected two calibrations of one model"
                )
            both[name] = mine.merged(others, self.samples / max(self.samples + other.samples, 1))
        unreached = tuple(name for name in self.unreached if name not in both)
        peak = max(self.peak_bytes, other.peak_bytes)
        return Moments(both, unreached, self.samples + other.samples, peak)

    def check_fit(self, sites: Sequence[Site]) -> None:
        """Refuse moments of other layers than these, or of inputs of other sizes."""
        known = {name: site for site in sites for name in site.names}
        for name, layer in self.items():
            site = known.get(name)
            if site is None or site.spec != layer.spec:
                raise ValueError(
                    f"layer {name!r}: the moments are of {layer.spec}, the model has "
                    f"{site.spec if site else 'no such layer'}; expected moments of this very "
                    "model: calibrate(model, batches) takes them"
                )
            for call in site.calls or ():
                if layer.sizes and call.size not in layer.sizes:
                    sizes = (*layer.sizes[:3], call.size)
                    *seen, asked = ("×".join(map(str, size)) for size in sizes)
                    raise ValueError(
                        f"layer {name!r}: the moments are of inputs of size {', '.join(seen)}, the "
                        f"example inputs give it {asked}; expected one size: calibrate with images "
                        "as large as example_inputs"
                    )

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the moments to a safetensors file; `Moments.load` reads it."""
        tensors, layers = {}, {}
        for name, layer in self.layers.items():
            tensors.update(
                {f"{name}/{part}": t.contiguous() for part, t in layer.tensors().items()}
            )
            layers[name] = {
                "spec": layer.spec.to_dict(),
                "count": layer.count,
                "sizes": layer.sizes,
            }
        header = {"format": _FORMAT, "layers": layers, "unreached": self.unreached}
        header |= {"samples": self.samples, "peak_bytes": self.peak_bytes}
        save_file(tensors, file, {"tdecomp_moments": json.dumps(header)})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> "Moments":
        """Read what `save` wrote; a ValueError for a file that is damaged or another's."""
        try:
            with safe_open(file, "pt") as opened:
                text = (opened.metadata() or {}).get("tdecomp_moments")
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file}: not a safetensors file: {error}") from error
        if text is None:
            raise ValueError(f"{file}: holds no moments; expected a file that Moments.save wrote")
        try:
            header = json.loads(text)
            if (found := header["format"]) != _FORMAT:
                raise ValueError(f"{file}: moments format {found!r}; this version reads {_FORMAT}")
            layers = {}
            for name, entry in header["layers"].items():
                keys = {part: f"{name}/{part}" for part in TENSORS}
                held = {part: tensors[key] for part, key in keys.items() if key in tensors}
                needed = ("mean", "rows" if "rows" in held else "matrix")
                if lacking := [keys[part] for part in needed if part not in held]:
                    raise ValueError(f"{file}: damaged: it lacks the moments {lacking}")
                spec, sizes = LayerSpec.from_dict(entry["spec"]), map(tuple, entry["sizes"])
                layers[name] = LayerMoments(spec, entry["count"], sizes=tuple(sizes), **held)
            return cls(layers, tuple(header["unreached"]), header["samples"], header["peak_bytes"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}: not the header that Moments.save writes for moments: {error!r}"
            ) from error
