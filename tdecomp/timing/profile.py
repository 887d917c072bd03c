"""Measured times by geometry: of layers, of their chains at a few ranks, and in between."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from torch import nn

from tdecomp.decomposers.base import Decomposer
from tdecomp.files.typed import parsed, typed
from tdecomp.files.whole_file import named_in_errors, whole_file
from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost, chain_cost
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.layers.stage import StageId, id_of
from tdecomp.model.example import LAYOUTS, Example
from tdecomp.ranks.grid import Rounding, rank_steps
from tdecomp.timing.speed import Quartiles
from tdecomp.timing.stopwatch import THIS_MACHINE, Setting, Stages, Stopwatch

_FORMAT = 1
# The smallest rank that is timed, as a share of the largest that saves MACs.
_SMALLEST = 0.06
# A layout, a layer or a chain, and the size of one call.
Key = tuple[str, tuple[StageId, ...], Call]
Calls = Sequence[Call]  # those of one pass
Curve = list[tuple[float, float]]  # MACs and seconds of a method's timed chains, ascending
# The fields that a saved profile holds as they are.
_PLAIN = {"model": str, "inputs": str, "round_to": int, "points": int}


@dataclass
class Profile:
    """How long a model, its layers and the chains that may replace them take; `profile` makes it.

    >>> model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.zeros(8, 64)
    >>> tdecomp.profile(model, x, "svd", effort="quick", progress=False).save("times.json")
    >>> times = tdecomp.Profile.load("times.json")
    >>> plan = tdecomp.plan(model, "svd", rank=8, example_inputs=x, profile=times, progress=False)
    >>> 0 < plan["0"].latency_before < 1
    True

    Attributes
    ----------
    setting : Setting
        The machine and the mode.
    model, inputs : str
        In words.
    whole : dict of str to Quartiles
        Seconds of the whole model in each layout that was tried.
    times : dict
        Seconds of one call of each layer and chain that was timed, as `Quartiles`.
    round_to : int
        The multiple of ranks that is fastest on this machine.
    points : int
        How many ranks of each method are timed on each layer.
    stopwatch : Stopwatch
        Takes all further measurements made with this profile; it is not saved.
    """

    setting: Setting
    model: str
    inputs: str
    whole: dict[str, Quartiles]
    times: dict[Key, Quartiles] = field(default_factory=dict)
    round_to: int = 1
    points: int = 5
    stopwatch: Stopwatch = field(default=THIS_MACHINE, repr=False, compare=False)
    _curves: dict[Any, Curve] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        layouts = {*self.whole, *(layout for layout, _, _ in self.times)}
        if not self.whole or layouts - LAYOUTS.keys() or min(self.round_to, self.points) < 1:
            raise ValueError(
                f"expected times in layouts of {[*LAYOUTS]}, round_to and points of 1 or more, got "
                f"{sorted(layouts)}, {self.round_to} and {self.points}"
            )

    @property
    def layouts(self) -> tuple[str, ...]:
        return tuple(self.whole)

    @property
    def best_layout(self) -> str:
        """The layout in which the original runs fastest."""
        return min(self.whole, key=lambda layout: self.whole[layout].median)

    @property
    def fastest(self) -> float:
        """Seconds of the original in its best layout."""
        return self.whole[self.best_layout].median

    @property
    def rounding(self) -> Rounding:
        return Rounding(self.round_to)

    @property
    def spread(self) -> float:
        """The median over all times of the distance between quartiles, as a share of the time."""
        return float(np.median([time.spread for time in self.times.values()] or [0.0]))

    def layer(self, spec: LayerSpec, calls: Calls, layout: str) -> float:
        """Seconds of all calls of a layer in one pass."""
        seconds = 0.0
        for call in calls:
            time = self.times.get((self.timed_in(layout), (spec,), call))
            if time is None:
                raise ValueError(
                    f"the profile has no time of {spec} for {call.batch} inputs of size "
                    f"{_size(call) or '—'}; expected a profile of this model with these example "
                    "inputs: profile(model, example_inputs, cache=profile)"
                )
            seconds += time.median
        return seconds

    def chain(
        self, decomposer: Decomposer, spec: LayerSpec, rank: Rank, calls: Calls, layout: str
    ) -> float:
        """Seconds of all calls of a chain in one pass; interpolated by MACs between timed ranks."""
        stages = decomposer.stages(spec, rank)
        return sum(self._chain(decomposer, spec, stages, call, layout) for call in calls)

    def _chain(
        self, decomposer: Decomposer, spec: LayerSpec, stages: Stages, call: Call, layout: str
    ) -> float:
        time = self.times.get(key_of(self.timed_in(layout), stages, call))
        if time is not None:
            return time.median
        curve = self._curve(decomposer, spec, call, layout)
        if not curve:
            return self.layer(spec, (call,), layout)
        macs, seconds = zip(*curve, strict=True)
        wanted = float(chain_cost(stages, (call,)).amount)
        if wanted > macs[-1]:
            return float(seconds[-1] * wanted / macs[-1])
        return float(np.interp(wanted, macs, seconds))

    def _curve(self, decomposer: Decomposer, spec: LayerSpec, call: Call, layout: str) -> Curve:
        """The timed chains of a method for a layer, found once."""
        name = (repr(decomposer), spec, spec.parts, call, layout)
        if name not in self._curves:
            ranks = timed_ranks(decomposer, spec, call, self.rounding, self.points)
            chains = [decomposer.stages(spec, rank) for rank in ranks]
            found = [self.times.get(key_of(self.timed_in(layout), c, call)) for c in chains]
            self._curves[name] = sorted(
                (float(chain_cost(stages, (call,)).amount), time.median)
                for stages, time in zip(chains, found, strict=True)
                if time is not None
            )
        return self._curves[name]

    def timed_in(self, layout: str) -> str:
        """The layout in which the layers of a model in this layout are timed."""
        # Layers are timed uncompiled even for a compiled model, as they call the same library. On
        # CPUs torch's compiler gives all convolutions channels_last.
        compiled_cpu = self.setting.compiled and self.setting.device == "cpu"
        return "channels_last" if compiled_cpu else layout

    def check(self, model: nn.Module, example: Example) -> None:
        """Raise a ValueError that names what differs: machine, mode, model or inputs."""
        differences = self.setting.differences(Setting.of(model, self.setting.compiled))
        then, now = vars(self), {"model": model_in_words(model), "inputs": example.describe()}
        differences += [
            f"{key} {then[key]}, now {new}" for key, new in now.items() if then[key] != new
        ]
        if differences:
            raise ValueError(
                f"the profile is of another setting: {'; '.join(differences)}. Its times "
                "do not hold for this one: take a new profile(model, example_inputs)"
            )

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the profile as JSON; `Profile.load` reads it."""
        data = {
            "format": _FORMAT,
            "setting": asdict(self.setting),
            **{name: getattr(self, name) for name in _PLAIN},
            "whole": {layout: asdict(time) for layout, time in self.whole.items()},
            "times": [
                {
                    "layout": layout,
                    "stages": [s if isinstance(s, str) else s.to_dict() for s in stages],
                    "call": asdict(call),
                    **asdict(time),
                }
                for (layout, stages, call), time in self.times.items()
            ],
        }
        with whole_file(file) as draft:
            draft.write_text(json.dumps(data), encoding="utf-8")

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> "Profile":
        """Read what `save` wrote; a ValueError if it is no profile, or of a newer format."""
        with named_in_errors(file):
            data = parsed(Path(file).read_bytes(), "profile", _FORMAT)
            entries = typed(tuple[_Entry, ...], data.get("times"), "times")
            return cls(
                typed(Setting, data.get("setting"), "setting"),
                whole=typed(dict[str, Quartiles], data.get("whole"), "whole"),
                times=dict(entry.timed for entry in entries),
                **{name: typed(kind, data.get(name), name) for name, kind in _PLAIN.items()},
            )

    def __str__(self) -> str:
        rows = []
        for (layout, (spec, *others), call), time in self.times.items():
            if others or not isinstance(spec, LayerSpec):
                continue
            ratios = [
                other.median / time.median
                for (where, chain, size), other in self.times.items()
                if (where, size) == (layout, call) and _replaces(chain, spec)
            ]
            span = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
            milliseconds = f"{1e3 * time.median:.3f}"
            rows.append([str(spec), str(call.batch), _size(call), layout, milliseconds, span])
        headers = ["layer", "batch", "size", "layout", "ms", "chains, of that"]
        colalign = ("left", "right", "left", "left", "right", "left")
        table = tabulate(rows, headers, disable_numparse=True, colalign=colalign) if rows else ""
        return f"{table}\n{self.summary()}"

    def summary(self) -> str:
        """One line: the machine, the whole model's time in each layout, and the scatter."""
        wholes = ", ".join(f"{1e3 * t.median:.1f} ms {name}" for name, t in self.whole.items())
        return (
            f"{self.model} on {self.inputs}: {wholes}; ranks in multiples of {self.round_to}; "
            f"times scatter by {self.spread:.0%}; {self.setting}"
        )


def timed_ranks(
    decomposer: Decomposer, spec: LayerSpec, call: Call, rounding: Rounding, count: int
) -> list[Rank]:
    """The ranks at which a method's chains for this layer are timed."""

    def cost(rank: Rank) -> Cost:
        return chain_cost(decomposer.stages(spec, rank), (call,))

    limit = chain_cost((spec,), (call,)).amount
    return rank_steps(decomposer.max_rank(spec), cost, limit, _SMALLEST, count, rounding)


def key_of(layout: str, stages: Stages, call: Call) -> Key:
    """The key of a time; it holds a method's own stages as plain data, as a saved profile does."""
    return layout, tuple(map(id_of, stages)), call


def model_in_words(model: nn.Module) -> str:
    """The class and the size of a model: enough to tell most models apart."""
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters"


def _size(call: Call) -> str:
    return "×".join(map(str, call.size))


def _replaces(chain: Sequence[StageId], spec: LayerSpec) -> bool:
    """Whether a chain of stock layers has the ends and the kernel of this layer."""
    stages = [stage for stage in chain if isinstance(stage, LayerSpec)]
    if len(stages) < max(len(chain), 2):
        return False
    ends = (stages[0].in_channels, stages[-1].out_channels)
    volume = [max(sizes) for sizes in zip(*(s.kernel_size for s in stages), strict=True)]
    return (*ends, *volume) == (spec.in_channels, spec.out_channels, *spec.kernel_size)


@dataclass(frozen=True)
class _Entry(Quartiles):
    """A time as the file holds it, with its key."""

    layout: str
    stages: tuple[StageId, ...]
    call: Call

    def __post_init__(self) -> None:
        super().__post_init__()
        ndims = {stage.ndim for stage in self.stages if isinstance(stage, LayerSpec)}
        if not self.stages or ndims - {len(self.call.size)}:
            raise ValueError(f"no stages, or stages that {self.call} does not fit")

    @property
    def timed(self) -> tuple[Key, Quartiles]:
        time = Quartiles(self.median, self.low, self.high)
        return (self.layout, self.stages, self.call), time
