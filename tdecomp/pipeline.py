"""From a plan to its result: fit, recover, time, report, swap; one function for each step."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from tdecomp.calibration.moments import Moments
from tdecomp.calibration.passes import Batches
from tdecomp.checkpoint.pretrained import remember
from tdecomp.integrations.saving import teach_imported
from tdecomp.layers.chain import Chain
from tdecomp.model.example import Example, in_layout
from tdecomp.model.fast_path import has_fused_layers
from tdecomp.model.opened.base import close_unchanged
from tdecomp.model.optimizers import Closed, as_optimizers, unoptimized
from tdecomp.model.surgery import copy_with, swap, tensors_in
from tdecomp.model.trial import Run, broken_layers
from tdecomp.model.weights import is_lazy
from tdecomp.plans.data_notes import data_notes
from tdecomp.plans.fit import Group, fit_groups
from tdecomp.plans.make import Planned
from tdecomp.plans.model_notes import model_notes
from tdecomp.plans.plan import Plan
from tdecomp.plans.report import Report
from tdecomp.plans.row import Row
from tdecomp.plans.rows import row_groups
from tdecomp.recovery.recovery import RecoveryStep
from tdecomp.recovery.steps import run_steps
from tdecomp.result import Decomposition
from tdecomp.runtime.progress import SILENT, Progress
from tdecomp.runtime.torch_state import no_inference_mode
from tdecomp.timing.speed import Speed
from tdecomp.timing.stopwatch import THIS_MACHINE, Stopwatch
from tdecomp.timing.whole_model import fused_kernels_note, measured_speed


def carry_out(
    model: nn.Module,
    planned: Planned,
    steps: Sequence[RecoveryStep],
    data: Batches | Moments | None,
    *,
    example: Example | None = None,
    timed: bool = False,
    stopwatch: Stopwatch = THIS_MACHINE,
    inplace: bool = False,
    optimizers: Sequence[Optimizer] = (),
    progress: Progress = SILENT,
    replan: Callable[[Mapping[str, str]], Planned] | None = None,
    closed: Closed | None = None,
    executor: Executor | None = None,
) -> Decomposition:
    """Decompose the layers as planned, and put the chains in their places last of all.

    Layers that the model does not run without stay; `replan` is given the reasons by their names,
    for ranks that depend on each other. `closed` has the parameters that open modules had, which
    are those that the optimizers know.
    """
    teach_imported()  # `model` may be a part of another one
    while True:
        fitted = fit_all(planned, progress, executor)
        broken = _broken(model, planned, fitted, example, data, inplace=inplace)
        if not broken or replan is None:
            break
        planned = replan(broken)
    plan = planned.plan.without(broken)
    kept = {row.name for row in plan if row.method is not None}
    fitted = [(row, chain) for row, chain in fitted if row.name in kept]
    chains = {planned.sites[row.name].module: chain for row, chain in fitted}
    changed = model if inplace and not steps else copy_with(model, chains)
    recovered = run_steps(steps, changed, model, data)
    speed = None
    if timed and example is not None:
        with progress.step("time both models"):
            speed = _speed(model, changed, chains, plan, example, stopwatch)
    finished = {row.name: row for row, _ in fitted}
    rows = [finished.get(row.name, row) for row in plan]
    notes = (*data_notes(rows, planned.moments), *model_notes(model, rows))
    if has_fused_layers(model, chains):
        measured = None if example is None else (example, stopwatch)
        notes = (*notes, fused_kernels_note(model, speed, measured))
    report = Report(rows, plan.everything_else, plan.decomposers, recovered, speed, notes)
    layout = None if plan.speed is None else (speed or plan.speed).layout
    if not inplace:
        with no_inference_mode():  # whose tensors could not be trained
            close_unchanged(changed)
            result = changed if layout is None else in_layout(changed, layout)
        remember(result, plan)
        return Decomposition(result, report, plan)
    _warn_of_unoptimized(model, chains, optimizers, closed)
    # The copy that was recovered goes; its values are the model's own now.
    report.recovery = tuple(replace(step, model=model) for step in recovered)
    decomposition = Decomposition(model, report, plan)
    values = None if changed is model else tensors_in(changed)
    with ExitStack() as undo:
        undo.callback(remember(model, plan))
        swap(model, chains, optimizers, values, layout, closed)
        undo.pop_all()
    return decomposition


def _broken(
    model: nn.Module,
    planned: Planned,
    fitted: Sequence[tuple[Row, Chain]],
    example: Example | None,
    data: Batches | Moments | None,
    *,
    inplace: bool,
) -> dict[str, str]:
    """The layers that the model does not run without, with the reasons."""
    runs: list[Run] = [] if example is None else [lambda model: example.copied().run(model)]
    if isinstance(data, Batches):
        runs += data.first_runs()
    odd = {} if planned.moments is None else planned.moments.oddities
    known = {row.name: odd[row.name] for row, _ in fitted if row.name in odd}  # the plan did not
    chains = {planned.sites[r.name].module: chain for r, chain in fitted if r.name not in known}
    sites = [planned.sites[row.name] for row, _ in fitted]
    names = {site.module: site.name for site in sites}
    ran = None
    if example is not None and all(site.calls is not None for site in sites):
        ran = [site.module for site in sites if site.calls]
    broken = broken_layers(model, chains, runs, inplace=inplace, ran=ran)
    return known | {names[layer]: reason for layer, reason in broken.items()}


def fit_all(
    planned: Planned, progress: Progress, executor: Executor | None = None
) -> list[tuple[Row, Chain]]:
    """The finished row and the chain of each layer that is to be decomposed, in their order."""
    todo = [
        Group(
            [planned.sites[row.name] for row in rows],
            rows,
            planned.plan.decomposers[rows[0].method or ""],
            *planned.fits.get(rows[0].name, ()),
        )
        for rows in row_groups(planned.plan)
    ]
    found = fit_groups(todo, planned.moments, "fit", progress, executor)
    places = {row.name: at for at, row in enumerate(planned.plan)}
    return sorted(found, key=lambda pair: places[pair[0].name])


def _speed(
    model: nn.Module,
    changed: nn.Module,
    chains: Mapping[nn.Module, Chain],
    plan: Plan,
    example: Example,
    stopwatch: Stopwatch,
) -> Speed | None:
    """The time of the result against the original's; None if it cannot be copied, or is lazy."""
    if any(map(is_lazy, model.modules())):  # timing would give the user's layers their sizes
        return None
    if changed is model:
        try:
            changed = copy_with(model, chains)
        except ValueError:
            return None
    return measured_speed(model, changed, plan.speed, example, stopwatch)


def check_optimizers(
    optimizers: Optimizer | Sequence[Optimizer], inplace: bool
) -> tuple[Optimizer, ...]:
    """The optimizers as a tuple; refuses anything else, and any without `inplace`."""
    listed = as_optimizers(optimizers)
    if listed and not inplace:
        raise ValueError(
            "optimizers: a copy has new parameters, which no optimizer knows; use inplace=True, "
            "or make the optimizer for result.model"
        )
    return listed


def _warn_of_unoptimized(
    model: nn.Module,
    chains: Mapping[nn.Module, Chain],
    optimizers: Sequence[Optimizer],
    closed: Closed | None,
) -> None:
    """Before anything is changed, since the caller may have made warnings errors."""
    missing = unoptimized(model, chains, optimizers, closed)
    if missing:
        words = f"no optimizer had these replaced parameters: {', '.join(missing)}"
        warnings.warn(words, stacklevel=4)
