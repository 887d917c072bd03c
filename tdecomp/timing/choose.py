"""A choice of ranks with measured times: guarded, rehearsed as a whole, corrected."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import nn

from tdecomp.decomposers.base import Decomposer
from tdecomp.layers.cost import Cost
from tdecomp.model.sites import Site
from tdecomp.plans.row import Row
from tdecomp.ranks.base import Candidate, Choice, Option, RankSelector
from tdecomp.timing.in_model import InModel, Point
from tdecomp.timing.pairs import Pair, Pairs
from tdecomp.timing.profile import Profile
from tdecomp.timing.rehearsal import Rehearsal
from tdecomp.timing.speed import Speed
from tdecomp.timing.time_penalty import quick_choices

# Choices that are timed as a whole model, at most, and how close to what was asked for is enough.
_REHEARSALS = 5
_CLOSE = 0.02
# What is aimed for, so that the scatter of a measurement does not make a miss of it.
_AIM = 0.965


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
    _rehearsal: Rehearsal = field(init=False)

    def __post_init__(self) -> None:
        self._pairs = Pairs(self.model, self.profile)
        self._rehearsal = Rehearsal(
            self.model, self.example_inputs, self.profile, self.selector.latency
        )

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
        original = self._original(layout)
        known, points, found = InModel.alone(original[1], original[0]), [original], list[Timed]()
        wanted = self.selector.latency
        for _ in range(_REHEARSALS):
            timed = self._once(layout, known)
            found.append(timed)
            if wanted is None or self._close(timed):
                break
            points.append((self._seconds(timed.choices, layout), self._in_profile(timed)))
            line = InModel.through(points, near=_AIM * wanted * self.profile.fastest)
            if line is None:
                break
            known = line
        return min(found, key=self._worth)

    def _original(self, layout: str) -> Point:
        nothing = [Choice()] * len(self.sites)
        return self._seconds(nothing, layout), self.profile.whole[layout].median

    def _in_profile(self, timed: Timed) -> float:
        """Seconds of the whole as the profile would have them.

        The machine may be in another mood by now, but for both models alike.
        """
        return (timed.speed.predicted or 1.0) * self.profile.fastest

    def _close(self, timed: Timed) -> bool:
        """Whether another choice would come no nearer to what was asked for."""
        wanted, predicted = self.selector.latency, timed.speed.predicted or 1.0
        nothing_changed = all(choice.candidate is None for choice in timed.choices)
        return wanted is None or nothing_changed or abs(predicted / (_AIM * wanted) - 1) <= _CLOSE

    def _seconds(self, choices: Sequence[Choice], layout: str) -> float:
        """Of all layers alone, those that are chosen for decomposed."""
        return sum(
            self._layer(site, layout)
            if choice.candidate is None or choice.rank is None
            else self._chain(site, choice.candidate.method, choice.rank, layout)
            for site, choice in zip(self.sites, choices, strict=True)
        )

    def _once(self, layout: str, known: InModel) -> Timed:
        """Choose, guard, and time the whole model of empty chains."""
        before = [self._layer(site, layout) for site in self.sites]
        candidates = [
            [self._with_times(c, site, layout, known.factor) for c in offered]
            for site, offered in zip(self.sites, self.candidates, strict=True)
        ]
        remaining = replace(self.rest, latency=known.rest)
        selector = self._for_layout(layout, known)
        while True:
            try:
                choices = self._selected(selector, candidates, remaining)
            except ValueError as error:
                choices = self._fastest(candidates, layout, error)
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
        rest = max(0.0, self.profile.whole[layout].median - sum(before))
        speed = self._rehearsed(choices, layout)
        if self.only_if_faster and (speed.predicted or 1.0) > 1:
            reason = f"the model with such chains takes {speed.predicted:.2f} of its time"
            choices = [c if c.candidate is None else Choice(reason=reason) for c in choices]
            seconds = {site.name: (t, t) for site, t in zip(self.sites, before, strict=True)}
            speed = self._rehearsed(choices, layout)
        return Timed(choices, seconds, speed, rest)

    def _selected(
        self, selector: RankSelector, candidates: Sequence[Sequence[Candidate]], rest: Cost
    ) -> list[Choice]:
        in_macs = selector.weighs_layers and selector.latency is None
        if self.only_if_faster and in_macs:
            choices = quick_choices(selector, candidates, rest)
        else:
            choices = selector.select(candidates, rest)
        return [self.guard(choice) for choice in choices]

    def _not_worth_it(self, pair: Pair) -> bool:
        if self.only_if_faster:
            return not pair.faster
        return self.selector.latency is not None and pair.ratio.low >= 1

    def _for_layout(self, layout: str, known: InModel) -> RankSelector:
        """The selector that asks for the same time, of a model that takes what is known here."""
        if self.selector.latency is None:
            return self.selector
        whole = known.rest + known.factor * self._original(layout)[0]
        aim = 1.0 if self.selector.latency == 1 else _AIM
        share = min(1.0, aim * self.selector.latency * self.profile.fastest / whole)
        if math.isclose(share, self.selector.latency, rel_tol=1e-6):
            return self.selector
        return replace(self.selector, latency=share)  # type: ignore[type-var]

    def _fastest(
        self, candidates: Sequence[Sequence[Candidate]], layout: str, error: ValueError
    ) -> list[Choice]:
        """The choices that take least time, of which it is measured what they reach.

        What a budget takes for impossible may be possible: the rest of a model takes less than
        what its layers leave of it.
        """
        if self.only_if_faster and self.selector.latency is None:
            raise ValueError(
                f"{error}. With only_if_faster=True a chain that is not measurably faster than its "
                "layer does not count"
            ) from error
        others = (getattr(self.selector, name, None) for name in ("macs", "params"))
        if self.selector.latency is None or any(share is not None for share in others):
            raise error
        choices = []
        for offered in candidates:
            options = [(c, o) for c in offered for o in c.options()]
            quickest = min(options, key=lambda pair: pair[1].cost.latency or 0.0, default=None)
            if quickest is None:
                choices.append(Choice(reason="no chain is faster"))
            else:
                candidate, option = quickest
                found = Choice(candidate, option.rank, error=option.error, loss=option.loss)
                choices.append(self.guard(found))
        least = self._rehearsed(choices, layout).predicted or 1.0
        if least > self.selector.latency:
            raise ValueError(
                f"Budget: latency={self.selector.latency} cannot be met: the least is {least:.3f} "
                "of the model's time, measured with these methods and layers. Expected a larger "
                "budget, more methods or fewer layers left alone"
            ) from error
        return choices

    def _with_times(
        self, candidate: Candidate, site: Site, layout: str, factor: float
    ) -> Candidate:
        whole = factor * self._layer(site, layout)

        def cost(rank: Any) -> Cost:
            latency = factor * self._chain(site, candidate.method, rank, layout)
            return replace(candidate.cost(rank), latency=latency)

        @cache
        def options() -> list[Option]:
            timed = [replace(o, cost=cost(o.rank)) for o in candidate.options()]
            if not self.only_if_faster and self.selector.latency is None:
                return timed
            return [o for o in timed if (o.cost.latency or 0.0) < whole]

        before = replace(candidate.before, latency=whole)
        return replace(candidate, before=before, cost=cost, options=options)

    def _layer(self, site: Site, layout: str) -> float:
        assert site.spec is not None
        return self.profile.layer(site.spec, site.calls or (), layout)

    def _chain(self, site: Site, method: str, rank: Any, layout: str) -> float:
        assert site.spec is not None
        decomposer, calls = self.decomposers[method], site.calls or ()
        return self.profile.chain(decomposer, site.spec, rank, calls, layout)

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
                chains[site.module] = decomposer.build_like(site.module, site.spec, choice.rank)
        return self._rehearsal.speed(chains, layout)


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
