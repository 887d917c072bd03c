"""Plan and apply: the only file that brings all the others together."""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from tdecomp.calibration.calibrate import watchable
from tdecomp.calibration.data import Source
from tdecomp.calibration.moments import Moments
from tdecomp.decomposers.base import Decomposer, relative_error
from tdecomp.layers.chain import Chain
from tdecomp.linalg.svd import frobenius_norm
from tdecomp.model.sites import Site
from tdecomp.model.surgery import as_optimizers, copy_with, swap, unoptimized
from tdecomp.parallel import parallel_map
from tdecomp.plans.make import check_weight, entries
from tdecomp.plans.plan import Plan, match_sites
from tdecomp.plans.report import Report
from tdecomp.plans.row import Row
from tdecomp.recovery.base import adopt
from tdecomp.recovery.steps import Steps
from tdecomp.result import Decomposition
from tdecomp.timing.setting import in_layout
from tdecomp.timing.speed import Speed
from tdecomp.timing.whole_model import measured_speed
from tdecomp.torch_state import undisturbed


def check_optimizers(
    optimizers: Optimizer | Sequence[Optimizer], inplace: bool
) -> tuple[Optimizer, ...]:
    """The optimizers as a tuple; refuses what is none, and any without `inplace`."""
    listed = as_optimizers(optimizers)
    if listed and not inplace:
        raise ValueError(
            "optimizers: a copy has new parameters, which no optimizer knows; use inplace=True, "
            "or make the optimizer for result.model"
        )
    return listed


def run(
    model: nn.Module,
    plan: Plan,
    moments: Moments | None,
    source: Source,
    steps: Steps,
    inplace: bool,
    optimizers: tuple[Optimizer, ...],
    example_inputs: Any,
) -> Decomposition:
    sites = match_sites(model, plan)
    chains: dict[nn.Module, Chain] = {}
    todo = [row for row in plan if row.method is not None]

    def fit(row: Row) -> tuple[Chain, Row]:
        return _fit(sites[row.name], row, plan, moments)

    def show(row: Row, fitted: tuple[Chain, Row]) -> None:
        chains[sites[row.name].module] = fitted[0]
        bar.set_postfix_str(f"{row.method} {row.name}", refresh=False)
        bar.update()

    with tqdm(total=len(todo), desc="decompose", unit="layer", disable=not source.progress) as bar:
        fitted = parallel_map(
            fit, todo, size=lambda row: entries(sites[row.name], moments), done=show
        )
    changed_rows = {row.name: row for _, row in fitted}
    rows = [changed_rows.get(row.name, row) for row in plan]
    # A copy first, in any case: the steps after it may fail, and compare with the original.
    changed = model if inplace and not steps else copy_with(model, chains)
    recovered = steps.run(changed, model, source) if steps else ()
    speed = None if example_inputs is None else _speed(model, changed, chains, plan, example_inputs)
    if inplace:
        missing = unoptimized(model, chains, optimizers)
        if missing:
            # Before anything is changed: the caller may have made warnings errors.
            warnings.warn(
                f"no optimizer had these replaced parameters: {', '.join(missing)}",
                stacklevel=3,
            )
        swap(model, chains, optimizers)
        if changed is not model:
            changed = adopt(model, changed)
    if plan.speed is not None:
        in_layout(changed, (speed or plan.speed).layout)
    return Decomposition(changed, Report(rows, plan.everything_else, recovered, speed), plan)


def _speed(
    model: nn.Module,
    changed: nn.Module,
    chains: dict[nn.Module, Chain],
    plan: Plan,
    example_inputs: Any,
) -> Speed | None:
    """The time of the result against the original's, or None of a model that has no copy."""
    if changed is model:
        try:
            changed = copy_with(model, chains)
        except ValueError:
            return None
    return measured_speed(model, changed, plan.speed, example_inputs)


def _fit(site: Site, row: Row, plan: Plan, moments: Moments | None) -> tuple[Chain, Row]:
    """The chain that takes the layer's place, and the row with its errors and the time it took."""
    assert row.method is not None
    assert row.rank is not None
    assert site.spec is not None
    check_weight(site)
    decomposer = plan.decomposers[row.method]
    weight = site.module.weight
    assert isinstance(weight, nn.Parameter)
    seen = None if moments is None else moments.layers.get(site.name)
    seen = None if seen is None else seen.to(weight.device)
    start = time.perf_counter()
    try:
        second = None if seen is None else seen.second_moments()
        factorization = decomposer.factorize(weight, site.spec, row.rank, second)
    except Exception as error:
        raise ValueError(
            f"layer {row.name!r} ({site.spec}): {row.method} at rank {row.rank} failed with "
            f"{type(error).__name__}: {error}. Leave the layer alone with exclude=[{row.name!r}], "
            "or choose another method or rank for it"
        ) from error
    seconds = time.perf_counter() - start
    # The factors are rounded to the layer's dtype by now; the product shall not be once more.
    with undisturbed(weight.device):
        precise = factorization.to(decomposer.fit_dtype(weight))
        approximation = precise.to_kernel()
        lost = relative_error(weight, approximation)
        lost_output = shift = None
        if seen is not None:
            lost_output = seen.output_error(weight, approximation, second)
            gone = weight.double() - approximation.double()
            shift = seen.mean_output(gone) if site.spec.bias else None
    if not math.isfinite(lost):
        raise ValueError(
            f"layer {row.name!r} ({site.spec}): {row.method} at rank {row.rank} gave factors that "
            "are not finite; choose another method or rank, or leave it alone with "
            f"exclude=[{row.name!r}]"
        )
    chain = decomposer.assemble(site.module, factorization, row.rank, shift)
    norms = precise.component_norms()
    return chain, replace(
        row,
        weight_error=lost,
        output_error=lost_output,
        note="; ".join(word for word in (row.note, _data_note(site, decomposer, moments)) if word)
        or None,
        fit_seconds=seconds,
        component_norms=None if norms is None else norms / (frobenius_norm(weight) or 1.0),
    )


def _data_note(site: Site, decomposer: Decomposer, moments: Moments | None) -> str | None:
    """What the reader should know of the data behind a layer's fit."""
    if moments is None:
        return None
    if not watchable(site.spec):
        return "fitted by its weights: transposed convolutions have no moments"
    if site.name not in moments:
        return "fitted by its weights: no batch reached it"
    if not decomposer.uses_moments:
        return f"fitted by its weights: {decomposer.name} uses no moments"
    layer = moments[site.name]
    if layer.few:
        return f"fewer samples ({layer.count:,}) than fan_in ({layer.spec.fan_in:,})"
    return None
