"""`profile`: the few measurements that tell what each layer and each of its chains would take."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.methods import Methods, listed_methods
from tdecomp.layers.cost import chain_cost
from tdecomp.layers.spec import Call, LayerSpec
from tdecomp.model.sites import Site, find_sites
from tdecomp.model.trace import describe
from tdecomp.ranks.grid import Rounding
from tdecomp.timing.layers import Stages, seconds_of, timed_ranks
from tdecomp.timing.profile import Profile, check_profile, key_of, model_in_words
from tdecomp.timing.setting import LAYOUTS, Setting, device_and_dtype, layout_of
from tdecomp.timing.stopwatch import Time
from tdecomp.timing.whole_model import whole_times

# Multiples of ranks that hardware may like, largest first, and the share of the step from one
# multiple to the next that must be taken half-way, already, for it to be such a step.
_MULTIPLES = (32, 16, 8)
_STEP = 0.7
_MISMATCH = ("error", "remeasure")


@dataclass(frozen=True)
class Effort:
    """How many ranks of each method are timed, how often, and for how many seconds each time."""

    points: int
    rounds: int
    min_block: float


EFFORTS = {
    "quick": Effort(3, 3, 0.001),
    "default": Effort(5, 7, 0.003),
    "thorough": Effort(9, 15, 0.01),
}


def profile(
    model: nn.Module,
    example_inputs: Any = None,
    methods: Methods = "dense",
    *,
    memory_format: str | torch.memory_format | None = None,
    compiled: bool = False,
    effort: str = "default",
    cache: Profile | None = None,
    on_mismatch: str = "error",
    progress: bool = True,
) -> Profile:
    """Time a model, its layers, and what the methods would make of them, on this machine.

    >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU())
    >>> times = profile(model, torch.zeros(1, 16, 8, 8), "lowrank", progress=False)
    >>> 0 < times.whole["contiguous"].median < 1
    True

    Times are those of the device and dtype of the model, the batch size of the inputs and torch's
    number of threads. Equal layers are timed once. Each method is timed at a few ranks, multiples
    of what the machine likes; a Budget(latency=...) reads the times of others between them.

    Parameters
    ----------
    model : nn.Module
    example_inputs : Tensor, tuple or dict
        One call of the model, of the size that is going to be used.
    methods : str, Decomposer or a sequence of them
        As for `tdecomp.plan`.
    memory_format : {"auto", "contiguous", "channels_last"} or torch.memory_format, optional
        The layout to run in; "auto" tries both, for the original and for what is made of it, and
        compares the best with the best. By default that of the model.
    compiled : bool
        Whether the model will run compiled. Layers and chains are timed one by one without, whole
        models with it.
    effort : {"quick", "default", "thorough"}
    cache : Profile, optional
        Times that need not be taken again.
    on_mismatch : {"error", "remeasure"}
        What to do with a cache from another machine or mode.
    progress : bool
        Show a bar.

    Returns
    -------
    Profile

    Raises
    ------
    TypeError
        For a cache that is no profile.
    ValueError
        Without inputs, if the model rejects them, for an unknown option, and for a cache of
        another setting.
    """
    check_profile("profile: cache", cache)
    layouts = _layouts(model, memory_format)
    if effort not in EFFORTS:
        raise ValueError(f"profile: expected effort to be one of {[*EFFORTS]}, got {effort!r}")
    if on_mismatch not in _MISMATCH:
        raise ValueError(
            f"profile: expected on_mismatch to be one of {[*_MISMATCH]}, got {on_mismatch!r}"
        )
    if example_inputs is None:
        raise ValueError(
            "profile: times are those of one call of the model, got no example_inputs; expected a "
            "tensor, a tuple or a dict of the size that is going to be used"
        )
    setting = Setting.of(model, compiled=compiled)
    known = _known(cache, setting, on_mismatch)
    sites = list(find_sites(model, None, example_inputs).values())
    decomposers = listed_methods(methods)
    how = EFFORTS[effort]
    whole = whole_times(model, example_inputs, layouts, compiled=compiled)
    result = Profile(
        setting, model_in_words(model), describe(example_inputs), whole, known, points=how.points
    )
    geometries = _geometries(sites)
    device, dtype = device_and_dtype(model)
    clock = partial(
        seconds_of, device=device, dtype=dtype, rounds=how.rounds, min_block=how.min_block
    )
    result.round_to = cache.round_to if known and cache else _liked(geometries, result, clock)
    work = [
        (layout, spec, call)
        for layout in dict.fromkeys(map(result.timed_in, layouts))
        for spec, call in geometries
    ]
    for layout, spec, call in tqdm(work, desc="profile", unit="layer", disable=not progress):
        chains = _chains(spec, call, decomposers, result.rounding, how.points)
        missing = [stages for stages in chains if key_of(layout, stages, call) not in result.times]
        if missing:
            seconds = clock(missing, call, layout)
            for stages, column in zip(missing, seconds.T, strict=True):
                result.times[key_of(layout, stages, call)] = Time.over(column)
    return result


def _chains(
    spec: LayerSpec,
    call: Call,
    decomposers: Iterable[Decomposer],
    rounding: Rounding,
    count: int,
) -> list[Stages]:
    """The layer first, then all chains to be timed with it."""
    chains: dict[Stages, None] = {(spec,): None}
    for decomposer in decomposers:
        if decomposer.refusal(spec) is None:
            for rank in timed_ranks(decomposer, spec, call, rounding, count):
                chains[tuple(decomposer.stages(spec, rank))] = None
    return list(chains)


def _geometries(sites: Sequence[Site]) -> list[tuple[LayerSpec, Call]]:
    """Each kind of layer and call once, those that take most first."""
    found = {
        (site.spec, call): chain_cost((site.spec,), (call,)).deciding
        for site in sites
        if site.spec is not None and site.reason is None
        for call in site.calls or ()
    }
    return sorted(found, key=lambda geometry: -found[geometry])


def _liked(geometries: Sequence[tuple[LayerSpec, Call]], result: Profile, clock: Any) -> int:
    """The multiple of channels that one stage of the costliest layer takes time by.

    Hardware works on blocks of channels: a block that is half empty takes as long as a full one.
    Where no such step stands out, the smallest.
    """
    for spec, call in geometries:
        largest = min(spec.in_channels, spec.out_channels) // 2 // _MULTIPLES[0] * _MULTIPLES[0]
        if largest < 2 * _MULTIPLES[0] or spec.groups > 1:
            continue
        narrower = {part for m in _MULTIPLES for part in (m, m // 2)}
        widths = [largest, *(largest - part for part in narrower)]
        stages = [(spec.pointwise(spec.in_channels, width),) for width in widths]
        seconds = np.median(clock(stages, call, result.timed_in(result.layouts[0])), axis=0)
        taken = dict(zip(widths, seconds.tolist(), strict=True))
        for multiple in _MULTIPLES:
            step = taken[largest] - taken[largest - multiple]
            half = taken[largest - multiple // 2] - taken[largest - multiple]
            if step > 0 and half > _STEP * step:
                return multiple
        break
    return _MULTIPLES[-1]


def _known(cache: Profile | None, setting: Setting, on_mismatch: str) -> dict[Any, Time]:
    if cache is None:
        return {}
    # Layers are timed the same way for compiled models and others.
    differences = [d for d in cache.setting.differences(setting) if not d.startswith("compiled")]
    if differences and on_mismatch == "error":
        raise ValueError(
            f"profile: the cache is of another setting: {'; '.join(differences)}; expected one of "
            "this machine and mode: on_mismatch='remeasure' takes all times anew"
        )
    return {} if differences else dict(cache.times)


def _layouts(model: nn.Module, wanted: str | torch.memory_format | None) -> tuple[str, ...]:
    if wanted is None:
        return (layout_of(model),)
    if wanted == "auto":
        return tuple(LAYOUTS)
    for name, memory_format in LAYOUTS.items():
        if wanted in (name, memory_format):
            return (name,)
    raise ValueError(
        f"profile: expected memory_format to be 'auto', one of {[*LAYOUTS]} or the torch "
        f"memory format, got {wanted!r}"
    )
