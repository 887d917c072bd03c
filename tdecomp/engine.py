"""Plan and apply: the only file that brings all the others together."""

import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from tdecomp import checkpoint
from tdecomp.augment import Augment, flip_and_shift
from tdecomp.batches import Forward
from tdecomp.calibration import watchable
from tdecomp.chain import Chain
from tdecomp.decomposers.base import Decomposer, relative_error
from tdecomp.decomposers.methods import Methods
from tdecomp.filters import Filters
from tdecomp.latency import Profile, Speed, measured_speed
from tdecomp.latency.setting import in_layout
from tdecomp.linalg import frobenius_norm, undisturbed
from tdecomp.moments import Moments
from tdecomp.parallel import each
from tdecomp.planning import as_patterns, check_weight, entries, plan_from
from tdecomp.plans import Plan, match_sites
from tdecomp.ranks import Budget
from tdecomp.recovery import Steps
from tdecomp.recovery.base import adopt
from tdecomp.report import Report, Row
from tdecomp.sites import Site
from tdecomp.source import Source
from tdecomp.surgery import as_optimizers, copy_with, replace_in, unoptimized
from tdecomp.timed import Clock


@dataclass(frozen=True)
class Decomposition:
    """The decomposed model, and what was done to each layer.

    Attributes
    ----------
    model : nn.Module
        A copy, or the model that was given if it was changed in place.
    report : Report
    plan : Plan
    """

    model: nn.Module
    report: Report
    plan: Plan

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the weights and the plan to one safetensors file; `tdecomp.load` reads it.

        >>> result.save("small.safetensors")  # doctest: +SKIP

        Raises
        ------
        ValueError
            If the model was decomposed in several steps, or its state dict holds something that
            is not a tensor.
        FileNotFoundError
            If the file's folder does not exist.
        """
        checkpoint.save(file, self.model, self.plan)


def decompose(
    model: nn.Module,
    methods: Methods,
    *,
    rank: Any,
    example_inputs: Any = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
    min_channels: int = 0,
    min_features: int = 0,
    allow_expansion: bool = False,
    data: Any = None,
    forward: Forward | None = None,
    max_batches: int | None = None,
    max_memory: int | None = None,
    refit: bool = False,
    recalibrate_batchnorm: bool = False,
    distill: bool = False,
    augment: Augment | None = flip_and_shift,
    profile: Profile | None = None,
    only_if_faster: bool = False,
    inplace: bool = False,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    progress: bool = True,
) -> Decomposition:
    """Decompose a model's layers: `plan` and `apply` in one call.

    >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    >>> result = decompose(model, "tucker2", rank=0.25, progress=False)
    >>> result.report["2"].rank
    (8, 8)

    The parameters are those of `plan` and of `apply`, and so are the errors; an error leaves the
    model as it was. Where ranks come from a `Budget`, or with measured times, the result is timed
    against the original on `example_inputs`, and the report says how it compares.

    Returns
    -------
    Decomposition
        With `.model` and `.report`.
    """
    steps = Steps(recalibrate_batchnorm, refit, distill)
    source = steps.take(Source(data, forward, max_batches, max_memory, progress, augment))
    listed = check_optimizers(optimizers, inplace)
    filters = Filters(as_patterns(include), as_patterns(exclude), where, min_channels, min_features)
    clock = Clock(profile, only_if_faster)
    planned, moments = plan_from(
        model, methods, rank, example_inputs, filters, source, allow_expansion, clock, expect=False
    )
    timed = planned.speed is not None or isinstance(rank, Budget)
    inputs = example_inputs if timed else None
    return _apply(model, planned, moments, source, steps, inplace, listed, inputs)


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    data: Any = None,
    forward: Forward | None = None,
    max_batches: int | None = None,
    max_memory: int | None = None,
    refit: bool = False,
    recalibrate_batchnorm: bool = False,
    distill: bool = False,
    augment: Augment | None = flip_and_shift,
    example_inputs: Any = None,
    inplace: bool = False,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    progress: bool = True,
) -> Decomposition:
    """Decompose a model's layers as a plan says.

    >>> from tdecomp.planning import plan
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> apply(model, plan(model, "svd", rank=4), progress=False).model[0]
    Chain(
      method='svd', rank=4
      (0): Linear(in_features=64, out_features=4, bias=False)
      (1): Linear(in_features=4, out_features=32, bias=True)
    )

    Parameters
    ----------
    model : nn.Module
        The one that was planned for, or another of the same architecture.
    plan : Plan
    data : Moments or iterable of batches, optional
        What the layers see, without labels: each layer is then fitted in the norm of its outputs.
    forward, max_batches, max_memory
        How the model is called with a batch, and limits; see `tdecomp.calibrate`.
    refit, recalibrate_batchnorm, distill : bool
        Get accuracy back afterwards, in this order; see `tdecomp.refit`,
        `tdecomp.recalibrate_batchnorm` and `tdecomp.distill`. They need batches as `data`.
    augment : callable ``(batch, generator) -> batch``, optional
        With refit or distill, what varies batches, also for layers that see few patches of them;
        by default images are mirrored and shifted a little. None where that makes no sense.
    example_inputs : Tensor, tuple or dict, optional
        With these the result is timed against the original, in the mode that the plan's profile
        was taken in.
    inplace : bool
        Change `model` itself, wholly or, on an error, not at all. By default a copy is changed.
    optimizers : Optimizer or sequence of them
        Only with `inplace`: the new parameters take the old ones' places in their groups; the
        state of all others is kept. A warning names replaced parameters that no optimizer has.
    progress : bool
        Show a bar over the layers.

    Returns
    -------
    Decomposition
        With `.model` and `.report`.

    Raises
    ------
    ValueError
        If the plan does not fit the model, or a weight cannot be factorized; names the layer.
    """
    steps = Steps(recalibrate_batchnorm, refit, distill)
    source = steps.take(Source(data, forward, max_batches, max_memory, progress, augment))
    listed = check_optimizers(optimizers, inplace)
    moments = None
    if data is not None:
        sites = list(match_sites(model, plan).values())
        planned = [row.name for row in plan if row.method is not None]
        moments = source.moments(model, sites, planned, gradients=False)
    return _apply(model, plan, moments, source, steps, inplace, listed, example_inputs)


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


def _apply(
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
        fitted = each(fit, todo, size=lambda row: entries(sites[row.name], moments), done=show)
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
        replace_in(model, chains, optimizers)
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
