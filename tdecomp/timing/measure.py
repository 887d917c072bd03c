"""`profile`: a few measurements, from which the time of any layer or chain is read."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from tdecomp.calibration.opening import opened_for
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.registry import Methods, listed_methods
from tdecomp.layers.cost import chain_cost
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.batches import Forward
from tdecomp.model.example import LAYOUTS, Example, layout_of
from tdecomp.model.opened.scope import closed
from tdecomp.model.sites import Site, find_sites
from tdecomp.model.weights import refuse_lazy
from tdecomp.runtime.progress import SILENT, Progress
from tdecomp.runtime.torch_state import restoring
from tdecomp.timing.profile import Profile, key_of, model_in_words, timed_ranks
from tdecomp.timing.speed import Quartiles
from tdecomp.timing.stopwatch import EFFORTS, THIS_MACHINE, Setting, Stages, Stopwatch, TimingEffort

Geometry = tuple[LayerSpec, Call]
# Multiples of ranks that hardware may prefer, largest first. Time rises in steps of a multiple if
# it has risen by this share half-way from one multiple to the next.
_MULTIPLES = (32, 16, 8)
_STEP = 0.7


def profile(
    model: nn.Module,
    example_inputs: Any = None,
    methods: Methods = "dense",
    *,
    forward: Forward | None = None,
    memory_format: str | torch.memory_format | None = None,
    compiled: bool = False,
    effort: str = "default",
    cache: Profile | None = None,
    on_mismatch: str = "error",
    progress: bool = True,
) -> Profile:
    """Time a model, its layers, and the chains that may replace them, on this machine.

    >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU())
    >>> times = profile(model, torch.zeros(1, 16, 8, 8), "lowrank", progress=False)
    >>> 0 < times.whole["contiguous"].median < 1
    True

    Times hold for the device and dtype of the model, the batch size of the inputs and torch's
    number of threads. Equal layers are timed once. Each method is timed at a few ranks, multiples
    that this machine prefers; a Budget(latency=...) interpolates between them.

    Parameters
    ----------
    model : nn.Module
        In the mode, and on the device, in which it is going to run; it is left as it was.
    example_inputs : Tensor, tuple or dict
        One call of the model, of the size that is going to be used.
    methods : str, Decomposer or a sequence of them
        As for `tdecomp.plan`.
    forward : callable ``(model, example_inputs) -> output``, optional
        How the model is called; by default a tuple holds positional and a dict keyword arguments.
    memory_format : {"auto", "contiguous", "channels_last"} or torch.memory_format, optional
        The layout to run in; by default that of the model. "auto" tries both layouts, for the
        original and for the result, and compares the best of each.
    compiled : bool
        Whether the model will run compiled. Single layers and chains are always timed uncompiled.
    effort : {"quick", "default", "thorough"}
        How long to measure: 3, 5 or 9 ranks of each method, in 3, 7 or 15 rounds.
    cache : Profile, optional
        Holds times that are not taken again.
    on_mismatch : {"error", "remeasure"}
        What to do with a cache from another machine or mode.
    progress : bool
        Show bars.

    Returns
    -------
    Profile
        Seconds of the model, of its layers and of their chains.

    Raises
    ------
    TypeError, ValueError
        For a cache that is no profile or is of another setting, for an unknown option, and for
        inputs that are missing or that the model rejects.
    """
    refuse_lazy(model, "profile")
    check_profile("profile: cache", cache)
    layouts = [name for name, value in LAYOUTS.items() if memory_format in ("auto", name, value)]
    if memory_format is not None and not layouts:
        raise ValueError(
            f"profile: expected memory_format to be 'auto', one of {[*LAYOUTS]} or the torch "
            f"memory format, got {memory_format!r}"
        )
    options = {"effort": (effort, [*EFFORTS]), "on_mismatch": (on_mismatch, ["error", "remeasure"])}
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"profile: expected {name} to be one of {known}, got {value!r}")
    if example_inputs is None:
        raise ValueError(
            "profile: times are those of one call of the model, got no example_inputs; expected a "
            "tensor, a tuple or a dict of the size that is going to be used"
        )
    if cache is not None:
        # Layers are timed uncompiled for compiled models too, so a cache of either kind holds.
        differences = cache.setting.differences(Setting.of(model, cache.setting.compiled))
        if differences and on_mismatch == "error":
            raise ValueError(
                f"profile: the cache is of another setting: {'; '.join(differences)}; expected one "
                "of this machine and mode: on_mismatch='remeasure' takes all times anew"
            )
        cache = None if differences else cache
    example = Example.of(example_inputs, forward)
    with restoring(model), opened_for(model, example):
        sites = list(find_sites(model, None, example).values())
        return measure(
            model, example, sites, listed_methods(methods), layouts=layouts, compiled=compiled,
            effort=EFFORTS[effort], cache=cache, progress=Progress(progress),
        )  # fmt: skip


def measure(
    model: nn.Module,
    example: Example,
    sites: Sequence[Site],
    decomposers: Sequence[Decomposer],
    *,
    layouts: Sequence[str] = (),
    compiled: bool = False,
    effort: TimingEffort = EFFORTS["default"],
    cache: Profile | None = None,
    progress: Progress = SILENT,
    stopwatch: Stopwatch = THIS_MACHINE,
) -> Profile:
    """The profile of a model whose sites are known; layers that are left alone are not timed."""
    layouts = layouts or (layout_of(model),)
    runs = [(model, layout) for layout in layouts]
    with closed(model):
        columns = stopwatch.models(runs, example, compiled=compiled).T
    whole = dict(zip(layouts, map(Quartiles.over, columns), strict=True))
    setting, known = Setting.of(model, compiled), dict(cache.times) if cache else {}
    result = Profile(
        setting, model_in_words(model), example.describe(), whole, known,
        points=effort.points, stopwatch=stopwatch,
    )  # fmt: skip
    geometries, seconds_of = _geometries(sites), stopwatch.layers_in(model, effort)
    result.round_to = cache.round_to if cache else _multiple(geometries, result, seconds_of)
    work = list(product(dict.fromkeys(map(result.timed_in, layouts)), geometries))
    for layout, (spec, call) in progress.over(work, "profile", len(work), "layers"):
        chains: list[Stages] = [(spec,)]
        for method in (d for d in decomposers if d.refuses(spec) is None):
            ranks = timed_ranks(method, spec, call, result.rounding, result.points)
            chains += [tuple(method.stages(spec, rank)) for rank in ranks]
        keyed = {key_of(layout, stages, call): stages for stages in chains}
        missing = {key: stages for key, stages in keyed.items() if key not in result.times}
        if missing:
            columns = seconds_of(list(missing.values()), call, layout).T
            result.times.update(zip(missing, map(Quartiles.over, columns), strict=True))
    return result


def check_profile(name: str, value: Any) -> None:
    """Refuse what is neither a profile nor None."""
    if value is not None and not isinstance(value, Profile):
        raise TypeError(
            f"{name}: expected a Profile, got {value!r}; tdecomp.profile(model, example_inputs) "
            "makes one, tdecomp.Profile.load(path) reads one that was saved"
        )


def _geometries(sites: Sequence[Site]) -> list[Geometry]:
    """Each different layer and call once, the most expensive first."""
    found = {  # the parts are no part of a spec's identity, but methods make chains of them
        (site.spec, site.spec.parts, call): ((site.spec, call), chain_cost((site.spec,), (call,)))
        for site in sites
        if site.spec is not None and site.reason is None
        for call in site.calls or ()
    }
    ordered = sorted(found.values(), key=lambda entry: -entry[1].amount)
    return [geometry for geometry, _ in ordered]


def _multiple(geometries: Sequence[Geometry], result: Profile, seconds_of: Any) -> int:
    """The multiple of channels in whose steps the time of the most expensive layer rises.

    Hardware works on blocks of channels: a block that is half empty takes as long as a full one.
    Where no step stands out, it is the smallest multiple.
    """
    for spec, call in geometries:
        largest = min(spec.in_channels, spec.out_channels) // 2 // _MULTIPLES[0] * _MULTIPLES[0]
        if largest < 2 * _MULTIPLES[0] or spec.groups > 1 or spec.lookup:
            continue
        widths = list({largest - part for m in _MULTIPLES for part in (0, m // 2, m)})
        stages = [(spec.pointwise(spec.in_channels, width),) for width in widths]
        seconds = seconds_of(stages, call, result.timed_in(result.layouts[0]))
        taken = dict(zip(widths, np.median(seconds, axis=0).tolist(), strict=True))
        for multiple in _MULTIPLES:
            step = taken[largest] - taken[largest - multiple]
            half = taken[largest - multiple // 2] - taken[largest - multiple]
            if step > 0 and half > _STEP * step:
                return multiple
        break
    return _MULTIPLES[-1]
