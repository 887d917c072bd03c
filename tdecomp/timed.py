"""A choice of ranks with measured times: guarded, rehearsed as a whole, corrected."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from tdecomp.cost import Cost
from tdecomp.decomposers.base import Decomposer
from tdecomp.latency import Profile, Speed, compare, profile
from tdecomp.latency.layers import random_weights
from tdecomp.latency.pairs import Pair, Pairs
from tdecomp.ranks.base import Candidate, Choice, Option, RankSelector
from tdecomp.report import Row
from tdecomp.sites import Site
from tdecomp.surgery import copy_with

# Choices that are timed as a whole model, at most, and how close to what was asked for is enough.
_REHEARSALS = 4
_CLOSE = 0.02
# Rounds in which the whole is timed: first, and again where that scatters by more than is to be
# saved, for which even a budget near 1 counts as so much.
_ROUNDS = (9, 27)
_LEAST_SAVING = 0.05
# How much slower or faster chains can be in the model than they were alone.
_CORRECTION = (0.25, 4.0)


@dataclass(frozen=True)
class Clock:
    """The times that a plan is to be made with, if any."""

    profile: Profile | None = None
    only_if_faster: bool = False

    def refuse_without(self, example_inputs: Any, selector: RankSelector) -> None:
        """Times are those of a call: refuse to look for them without inputs."""
        asked = {
            "only_if_faster=True": self.only_if_faster,
            "Budget(latency=...)": selector.latency is not None,
            "profile=...": self.profile is not None,
        }
        for name, wanted in asked.items():
            if wanted and example_inputs is None:
                raise ValueError(
                    f"{name}: times are those of one call of the model, got no example_inputs; "
                    "expected inputs of the batch size that is going to be used"
                )

    def profile_for(
        self,
        selector: RankSelector,
        model: nn.Module,
        example_inputs: Any,
        methods: Sequence[Decomposer],
        progress: bool,
    ) -> Profile | None:
        """The profile that was given, checked, a new one where one is needed, or None."""
        if self.profile is not None:
            self.profile.check(model, example_inputs)
            return self.profile
        if selector.latency is None and not self.only_if_faster:
            return None
        return profile(model, example_inputs, list(methods), progress=progress)


@dataclass(frozen=True)
class Timed:
    """What was chosen for each site, what it takes, and the time of the whole."""

    choices: list[Choice]
    seconds: Mapping[str, tuple[float, float]]
    speed: Speed
    rest: float

    def on(self, row: Row) -> Row:
        """The row with the times of its layer before and after."""
        before, after = self.seconds.get(row.name, (None, None))
        return replace(row, latency_before=before, latency_after=after)


@dataclass
class TimedChoice:
    """Chooses for the sites of one model with the times of a profile.

    Attributes
    ----------
    model : nn.Module
    example_inputs : Tensor, tuple or dict
    sites : sequence of Site
    candidates : sequence of sequences of Candidate
        For each site; their times are added here.
    decomposers : mapping of str to Decomposer
    selector : RankSelector
    rest : Cost
        Of all of the model that is none of these sites.
    profile : Profile
    only_if_faster : bool
        Leave each layer alone whose chain is not measurably faster.
    guard : callable ``Choice -> Choice``
        What else a choice has to pass.
    """

    model: nn.Module
    example_inputs: Any
    sites: Sequence[Site]
    candidates: Sequence[Sequence[Candidate]]
    decomposers: Mapping[str, Decomposer]
    selector: RankSelector
    rest: Cost
    profile: Profile
    only_if_faster: bool
    guard: Callable[[Choice], Choice]
    _pairs: Pairs = field(init=False)
    _scales: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self._pairs = Pairs(self.model, self.profile)
        self._scales = {layout: self._scale(layout) for layout in self.profile.layouts}

    def _scale(self, layout: str) -> float:
        """Below 1 where the layers take longer alone than the whole model with all of them."""
        alone = sum(
            self.profile.layer(site.spec, site.calls or (), layout)
            for site in self.sites
            if site.spec is not None
        )
        return min(1.0, self.profile.whole[layout].median / alone) if alone > 0 else 1.0

    def best(self) -> Timed:
        """The better of what was found in each layout.

        Raises
        ------
        ValueError
            If the budget cannot be met, or the times scatter by more than what it asks for.
        """
        found: list[Timed] = []
        refused: dict[str, ValueError] = {}
        for layout in self.profile.layouts:
            try:
                found.append(self._in_layout(layout))
            except ValueError as error:
                refused[layout] = error
        if not found:
            raise refused[self.profile.best_layout]
        return min(found, key=self._worth)

    def _worth(self, timed: Timed) -> tuple[float, float]:
        """Smaller is better: what is lost where time is given, else the time."""
        predicted = timed.speed.predicted or 1.0
        if self.selector.latency is None:
            return predicted, 0.0
        missed = max(0.0, predicted / self.selector.latency - 1 - _CLOSE)
        return missed, sum(choice.loss for choice in timed.choices)

    def _in_layout(self, layout: str) -> Timed:
        wanted, found, factor = self.selector.latency, [], 1.0
        for _ in range(_REHEARSALS):
            timed = self._once(layout, factor)
            found.append(timed)
            ratio = timed.speed.predicted or 1.0
            if wanted is None or abs(ratio / wanted - 1) <= _CLOSE or timed.speed.measured is None:
                break
            corrected = self._factor(timed, layout)
            if abs(corrected / factor - 1) < _CLOSE / 2:
                break
            factor = corrected
        return min(found, key=self._worth)

    def _factor(self, timed: Timed, layout: str) -> float:
        """How much slower the chains were in the model than alone, all else taken as known."""
        predicted = timed.speed.predicted or 1.0
        seconds = predicted * timed.speed.seconds_before - timed.rest
        alone = 0.0
        for site, choice in zip(self.sites, timed.choices, strict=True):
            if choice.candidate is None or choice.rank is None:
                seconds -= self._layer(site, layout)
            else:
                alone += self._chain(site, choice.candidate.method, choice.rank, layout)
        low, high = _CORRECTION
        return min(max(seconds / alone, low), high) if alone > 0 else 1.0

    def _once(self, layout: str, factor: float) -> Timed:
        """Choose, guard, and time the whole model of empty chains."""
        before = [self._layer(site, layout) for site in self.sites]
        whole = self.profile.whole[layout].median
        rest = max(0.0, whole - sum(before))
        candidates = [
            [self._with_times(c, site, seconds, layout, factor) for c in offered]
            for site, seconds, offered in zip(self.sites, before, self.candidates, strict=True)
        ]
        selector = self._for_layout(layout)
        remaining = replace(self.rest, latency=rest)
        while True:
            choices = [self.guard(c) for c in selector.select(candidates, remaining)]
            pairs = [self._pair(s, c, layout) for s, c in zip(self.sites, choices, strict=True)]
            slower = [i for i, pair in enumerate(pairs) if pair and self._not_worth_it(pair)]
            if not slower:
                break
            if not selector.weighs_layers:
                for i in slower:
                    choices[i], pairs[i] = Choice(reason=_reason(choices[i], pairs[i])), None
                break
            for i in slower:
                candidates[i] = [_without(c, choices[i]) for c in candidates[i]]
        seconds = {
            site.name: (whole, whole) if pair is None else (pair.before, pair.after)
            for site, pair, whole in zip(self.sites, pairs, before, strict=True)
        }
        return Timed(choices, seconds, self._rehearsed(choices, layout), rest)

    def _not_worth_it(self, pair: Pair) -> bool:
        if self.only_if_faster:
            return not pair.faster
        return self.selector.latency is not None and pair.ratio.median >= 1

    def _for_layout(self, layout: str) -> RankSelector:
        """The selector that asks for the same time, of a model that is slower in this layout."""
        if self.selector.latency is None:
            return self.selector
        whole = self.profile.whole
        best = whole[self.profile.best_layout].median
        share = min(1.0, self.selector.latency * best / whole[layout].median)
        return replace(self.selector, latency=share)  # type: ignore[type-var]

    def _with_times(
        self, candidate: Candidate, site: Site, seconds: float, layout: str, factor: float
    ) -> Candidate:
        def cost(rank: Any) -> Cost:
            latency = factor * self._chain(site, candidate.method, rank, layout)
            return replace(candidate.cost(rank), latency=latency)

        def options() -> list[Option]:
            timed = [replace(o, cost=cost(o.rank)) for o in candidate.options()]
            if not self.only_if_faster and self.selector.latency is None:
                return timed
            return [o for o in timed if (o.cost.latency or 0.0) < factor * seconds]

        listed = None

        def once() -> list[Option]:
            nonlocal listed
            listed = options() if listed is None else listed
            return listed

        before = replace(candidate.before, latency=seconds)
        return replace(candidate, before=before, cost=cost, options=once)

    def _layer(self, site: Site, layout: str) -> float:
        assert site.spec is not None
        return self._scales[layout] * self.profile.layer(site.spec, site.calls or (), layout)

    def _chain(self, site: Site, method: str, rank: Any, layout: str) -> float:
        assert site.spec is not None
        decomposer, calls = self.decomposers[method], site.calls or ()
        seconds = self.profile.chain(decomposer, site.spec, rank, calls, layout)
        return self._scales[layout] * seconds

    def _pair(self, site: Site, choice: Choice, layout: str) -> Pair | None:
        if choice.candidate is None or choice.rank is None or not site.calls:
            return None
        assert site.spec is not None
        stages = tuple(self.decomposers[choice.candidate.method].stages(site.spec, choice.rank))
        return self._pairs.of(site.spec, stages, site.calls, layout)

    def _rehearsed(self, choices: Sequence[Choice], layout: str) -> Speed:
        """The time of the model with these chains, whose weights do not matter."""
        chains = {}
        for site, choice in zip(self.sites, choices, strict=True):
            if choice.candidate is not None and choice.rank is not None:
                assert site.spec is not None
                decomposer = self.decomposers[choice.candidate.method]
                chain = decomposer.build_like(site.module, site.spec, choice.rank)
                random_weights(chain)
                chains[site.module] = chain
        before = self.profile.best_layout
        if not chains:
            seconds = self.profile.whole[before].median
            nothing = Speed(seconds, before, before, 1.0, compiled=self.profile.setting.compiled)
            return replace(nothing, budget=self.selector.latency, tried=self.profile.layouts)
        speed = self._told_from_noise(copy_with(self.model, chains), before, layout)
        assert speed.measured is not None
        return replace(
            speed,
            predicted=speed.measured.median,
            budget=self.selector.latency,
            tried=self.profile.layouts,
        )

    def _told_from_noise(self, changed: nn.Module, before: str, layout: str) -> Speed:
        """The time of the whole, measured again for longer where it scatters too much."""
        wanted = self.selector.latency
        scatter = 0.0
        for rounds in _ROUNDS:
            speed = compare(
                self.model,
                changed,
                self.example_inputs,
                ((before,), (layout,)),
                compiled=self.profile.setting.compiled,
                rounds=rounds,
            )
            assert speed.measured is not None
            scatter = speed.measured.high - speed.measured.low
            if wanted is None or scatter <= max(1 - wanted, _LEAST_SAVING):
                return speed
        assert wanted is not None
        raise ValueError(
            f"Budget(latency={wanted}): from one round to the next the times scatter by "
            f"{scatter:.0%} of the original's, more than the {1 - wanted:.0%} that is to be saved, "
            "so that a choice would be made on noise; expected a quieter machine: stop what else "
            "runs, take fewer threads (torch.set_num_threads), or use Budget(macs=...)"
        )


def _without(candidate: Candidate, choice: Choice) -> Candidate:
    """The candidate without one of its options."""
    if choice.candidate is None or candidate.method != choice.candidate.method:
        return candidate
    left = [option for option in candidate.options() if option.rank != choice.rank]
    return replace(candidate, options=lambda: left)


def _reason(choice: Choice, pair: Pair | None) -> str:
    assert choice.candidate is not None
    assert pair is not None
    words = f"{choice.candidate.method} at rank {choice.rank} takes"
    times = f"{1e3 * pair.after:.3g} ms against the layer's {1e3 * pair.before:.3g} ms"
    if pair.ratio.low >= 1:
        return f"slower: {words} {times}"
    scatter = f"the ratio scatters from {pair.ratio.low:.2f} to {pair.ratio.high:.2f}"
    return f"not measurably faster: {words} {times}, and {scatter}"
