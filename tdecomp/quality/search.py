"""Trying one share after the other."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tdecomp.calibration.moments import Moments
from tdecomp.calibration.passes import Batches
from tdecomp.layers.chain import Rank
from tdecomp.pipeline import carry_out
from tdecomp.plans.make import Planned, Request, make_plan
from tdecomp.plans.plan import Plan
from tdecomp.plans.report import Report
from tdecomp.quality.bracket import Bracket
from tdecomp.quality.compression import UNITS, Compression, Trial
from tdecomp.quality.quality import Judge, Quality
from tdecomp.ranks.base import UnmetError
from tdecomp.ranks.budget import Budget
from tdecomp.recovery.recovery import RecoveryStep
from tdecomp.recovery.steps import use_variants
from tdecomp.result import Decomposition
from tdecomp.timing.stopwatch import THIS_MACHINE
from tdecomp.timing.whole_model import measured_speed

EVERYTHING = Budget(params=1.0)  # which needs no layer to be decomposed


class Search:
    """Plans, makes and judges one model after the other; all of them share moments and fits."""

    def __init__(
        self,
        model: nn.Module,
        quality: Quality,
        of: str,
        request: Request,
        steps: Sequence[RecoveryStep],
        data: Batches | Moments | None,
    ) -> None:
        self._model, self._of, self._steps = model, of, steps
        self._progress, profile = request.progress, request.profile
        self._stopwatch = THIS_MACHINE if profile is None else profile.stopwatch
        with self._progress.step("evaluate the original"):
            self._judge = Judge(quality, model)
        self._seen: Batches | Moments | None = data
        self._request = request
        self._whole = self._plan(EVERYTHING)
        self._seen, self._data = self._whole.moments, data

    def run(self) -> Compression:
        """Try shares until the smallest that will do is found, or no evaluation is left."""
        judge, bracket, trials = self._judge, Bracket(), list[Trial]()
        best, smallest = self._undecomposed(), 1.0
        used = {_choices(best.plan): 0.0}  # how much of what may be lost, by what was chosen
        metric = f"the metric takes {judge.seconds:.2g} s"
        with self._progress.step("compress_to", judge.left, "evaluations", words=metric) as step:
            while judge.left and (share := bracket.next_share()) is not None:
                words = f"{share:.3f} of the {UNITS[self._of]}"
                step.say(f"{words}, {smallest:.3f} will do" if smallest < 1 else words)
                started = time.perf_counter()
                try:
                    planned = self._plan(self._budget(share))
                    choices = _choices(planned.plan)
                    if choices in used:
                        bracket.add(share, used[choices])
                        continue
                    result = self._make(planned, share)
                except UnmetError as unmet:
                    bracket.raise_floor(unmet.least)
                    continue
                reached = self._share_of(result.report)
                verdict = judge.judge(result.model, f"the model at {words}")
                trials.append(Trial(share, reached, verdict, time.perf_counter() - started))
                step.advance(count=len(verdict.values))
                used[choices] = verdict.used
                bracket.add(min(share, reached) if verdict.kept else share, verdict.used)
                if verdict.kept and reached < smallest:
                    best, smallest = result, reached
        trials.sort(key=lambda trial: -trial.reached)
        return Compression(
            best.model, self._timed(best), best.plan, tuple(trials), judge.original, judge.allowed,
            self._of,
        )  # fmt: skip

    def _budget(self, share: float) -> Budget:
        limit: dict[str, Any] = {self._of: share}
        return Budget(**limit)

    def _plan(self, selector: Budget) -> Planned:
        request = replace(self._request, selector=selector)
        return make_plan(self._model, request, self._seen, use_variants(self._steps), expect=False)

    def _make(self, planned: Planned, share: float) -> Decomposition:
        def replan(reasons: Mapping[str, str]) -> Planned:
            left_alone = {**self._request.left_alone, **reasons}
            self._request = replace(self._request, left_alone=left_alone)
            return self._plan(self._budget(share))

        return carry_out(
            self._model, planned, self._steps, self._data, example=self._request.example,
            timed=self._of == "latency", replan=replan, progress=self._progress,
            stopwatch=self._stopwatch,
        )  # fmt: skip

    def _undecomposed(self) -> Decomposition:
        """A copy of the model, all its layers left alone."""
        why = "no smaller model keeps the quality"
        reasons = {row.name: why for row in self._whole.plan if row.method is not None}
        planned = replace(self._whole, plan=self._whole.plan.without(reasons))
        return carry_out(self._model, planned, (), None)

    def _share_of(self, report: Report) -> float:
        if self._of != "latency":
            after, before = getattr(report.after, self._of), getattr(report.before, self._of)
            return float(after / before)
        speed = report.speed
        return 1.0 if speed is None or speed.measured is None else speed.measured.median

    def _timed(self, result: Decomposition) -> Report:
        """The report with the time of the model against the original's, if it has none yet."""
        report, example = result.report, self._request.example
        if report.speed is not None or example is None:
            return report
        speed = measured_speed(
            self._model, result.model, result.plan.speed, example, self._stopwatch
        )
        return Report(
            report.rows, report.everything_else, report.decomposers, report.recovery, speed,
            report.notes,
        )  # fmt: skip


def _choices(plan: Plan) -> tuple[tuple[str, str | None, Rank | None], ...]:
    return tuple((row.name, row.method, row.rank) for row in plan)
