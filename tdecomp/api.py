"""The public functions: their signatures and documentation."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tdecomp.calibration.calibrate import site_moments
from tdecomp.calibration.opening import opened_for
from tdecomp.calibration.passes import batches_or_moments
from tdecomp.decomposers.registry import Methods, listed_methods
from tdecomp.loss_curves.offers import fits_before
from tdecomp.loss_curves.sensitivity import Sensitivity, measure_sensitivity
from tdecomp.model.batches import Forward
from tdecomp.model.example import Example
from tdecomp.model.filters import Filters
from tdecomp.model.sites import check_weight, find_sites
from tdecomp.pipeline import carry_out, check_optimizers
from tdecomp.plans.make import Planned, Request, make_plan
from tdecomp.plans.plan import Plan, match_sites
from tdecomp.ranks.short_forms import get_selector
from tdecomp.recovery.steps import Recover, check_data, recovery_steps, use_variants
from tdecomp.result import Decomposition
from tdecomp.runtime.executors import check_executor
from tdecomp.runtime.progress import Progress
from tdecomp.runtime.torch_state import restoring
from tdecomp.streaming.survey import folder_sensitivity, planned_folder, refuse_for_folders
from tdecomp.timing.profile import Profile
from tdecomp.timing.stopwatch import THIS_MACHINE


def decompose(
    model: nn.Module,
    methods: Methods,
    *,
    rank: Any,
    example_inputs: Any = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
    allow_expansion: bool = False,
    data: Any = None,
    forward: Forward | None = None,
    recover: Recover = (),
    profile: Profile | None = None,
    only_if_faster: bool = False,
    inplace: bool = False,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    seed: int | None = None,
    progress: bool = True,
    executor: Executor | None = None,
) -> Decomposition:
    """Decompose a model's layers: `plan` and `apply` in one call.

    >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    >>> result = decompose(model, "tucker2", rank=0.25, progress=False)
    >>> result.report["2"].rank
    (8, 8)

    Parameters
    ----------
    model : nn.Module
        A trained model, or a single layer.
    methods : str, Decomposer or a sequence of them
        With several, the first that can take a layer is used, unless the ranks are a `Budget`,
        which finds the best for each layer. "auto" is all of them, "dense" those whose chains are
        dense layers alone: svd, lowrank, spatial and tucker2.
    rank : int, tuple, float, str, RankSelector or dict
        An int is a rank (for Tucker-2 the same rank twice, for tensor trains the most that each
        may be; a tuple is taken as it is), a float below 1 that fraction of the largest useful
        rank, "vbmf" and "breakeven" name selectors; see `tdecomp.Ratio`, `Budget`, `VBMF`,
        `Energy`. A dict gives layers, by name or glob, a rank or a selector each.
    example_inputs : Tensor, tuple or dict, optional
        One call of the model: a tuple is positional, a dict keyword arguments. MACs are those of
        this call, the batch included; without it only parameters are counted.
    include, exclude : str or sequence of str
        Names, globs, or the name of a container for all layers in it.
    where : callable ``(module, name) -> bool``, optional
        Which layers may be decomposed, such as `tdecomp.at_least(channels=16, features=64)`.
    allow_expansion : bool
        Decompose even where this saves no MACs.
    data : iterable of batches, Moments or Data, optional
        Unlabelled inputs: each layer is then fitted in the norm of its outputs, and errors are
        those of the outputs. `tdecomp.Data` limits, masks or varies the batches.
    forward : callable ``(model, batch) -> output``, optional
        How the model is called with a batch, and with the example inputs; see
        `tdecomp.calibrate`.
    recover : str, step or a sequence of them
        How to get accuracy back afterwards, in this order: "refit", "reconstruct",
        "recalibrate_batchnorm", "distill", or `tdecomp.Refit`, `Reconstruct`,
        `RecalibrateBatchnorm`, `Distill` with options. They need batches as `data`.
    profile : Profile, optional
        Measured times, from `tdecomp.profile`: rows then have them, the plan says how long the
        whole model will take, in the profile's mode, and a Budget prefers ranks that suit the
        machine. Budget(latency=...) and `only_if_faster` take a profile of their own if none is
        given, in eager mode and the model's layout.
    only_if_faster : bool
        Leave alone each layer whose chain is not measurably faster.
    inplace : bool
        Change `model` itself, wholly or, on an error, not at all. By default a copy is changed.
    optimizers : Optimizer or sequence of them
        Only with `inplace`: the new parameters take the old ones' places in their groups; the
        state of all others is kept. A warning names replaced parameters that no optimizer has.
    seed : int, optional
        Of everything random: gradients of random mixtures, varied batches, training, and the
        order of a DataLoader that shuffles by torch's global generator, which is put back
        afterwards. With the same seed, data, machine and number of threads the result is the
        same bit for bit, except where ranks depend on measured times, or where other threads
        draw from that generator meanwhile. Without a seed everything but the loader's own order
        is drawn from fixed seeds.
    progress : bool
        Show bars.
    executor : concurrent.futures.Executor, optional
        What computes losses and fits, instead of threads of this process: a `ThreadPoolExecutor`,
        a `ProcessPoolExecutor` whose workers are spawned, `client.get_executor()` of a Dask client.
        Weights travel to it, never the model; it is not shut down. Its workers keep the number of
        torch's threads that they have. Calibration, training and timing stay here.

    Returns
    -------
    Decomposition
        With `.model`, `.report` and `.plan`. With example inputs or batches the result runs once,
        in the mode that the model is in, before it is returned or replaced; a layer that it does
        not run with is left alone, and its row says why. Where ranks come from a `Budget`, or with
        measured times, the result is timed against the original on `example_inputs`.

    Raises
    ------
    ValueError, TypeError
        For a rank, a method, a filter, inputs, data or weights that cannot be used; the message
        names the layer, what was got, what was expected and the remedy. The model is as it was.
    """
    steps = recovery_steps(recover)
    listed = check_optimizers(optimizers, inplace)
    example = None if example_inputs is None else Example.of(example_inputs, forward)
    check_executor(executor)
    bar = Progress(progress)
    batches = batches_or_moments(data, forward=forward, seed=seed, progress=bar)
    check_data(steps, batches)
    with restoring(model, seed=seed), opened_for(model, example, batches) as opened:
        request = Request(
            listed_methods(methods), get_selector(rank), Filters(include, exclude, where),
            example, allow_expansion, profile, only_if_faster, bar, executor=executor,
        )  # fmt: skip
        planned = make_plan(model, request, batches, use_variants(steps), expect=False)
        weighs = request.selector.weighs_layers

        def replan(reasons: Mapping[str, str]) -> Planned:
            nonlocal request
            request = replace(request, left_alone={**request.left_alone, **reasons})
            return make_plan(model, request, planned.moments, expect=False)

        return carry_out(
            model,
            planned,
            steps,
            batches,
            example=example,
            timed=planned.plan.speed is not None or weighs,
            replan=replan if weighs else None,
            stopwatch=THIS_MACHINE if profile is None else profile.stopwatch,
            inplace=inplace,
            optimizers=listed,
            progress=bar,
            closed=opened.closed,
            executor=executor,
        )


def plan(
    model: nn.Module | str | os.PathLike[str],
    methods: Methods,
    *,
    rank: Any,
    example_inputs: Any = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
    allow_expansion: bool = False,
    data: Any = None,
    forward: Forward | None = None,
    profile: Profile | None = None,
    only_if_faster: bool = False,
    seed: int | None = None,
    progress: bool = True,
    executor: Executor | None = None,
) -> Plan:
    """Choose a method and a rank for every layer, without changing anything.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> plan(model, "svd", rank=4)["0"].params_after
    416

    The other parameters are those of `decompose`, and so are the errors.

    Parameters
    ----------
    model : nn.Module or path
        A model, or a folder of safetensors with its config.json, as `save_pretrained` writes it:
        its tensors are then read one by one, and may be more than fit into memory. Only what needs
        no call of the model can be asked of a folder.

    Returns
    -------
    Plan
        A row for every layer; those left alone say why.
    """
    check_executor(executor)
    bar = Progress(progress)
    if isinstance(model, (str, os.PathLike)):
        filters = Filters(include, exclude, where)
        refuse_for_folders(
            "plan", filters, example_inputs=example_inputs, data=data, forward=forward,
            profile=profile, only_if_faster=only_if_faster,
        )  # fmt: skip
        return planned_folder(
            model, listed_methods(methods), get_selector(rank), filters,
            allow_expansion=allow_expansion, executor=executor, progress=bar,
        )  # fmt: skip
    example = None if example_inputs is None else Example.of(example_inputs, forward)
    batches = batches_or_moments(data, forward=forward, seed=seed, progress=bar)
    with restoring(model, seed=seed), opened_for(model, example, batches):
        request = Request(
            listed_methods(methods), get_selector(rank), Filters(include, exclude, where),
            example, allow_expansion, profile, only_if_faster, bar, executor=executor,
        )  # fmt: skip
        return make_plan(model, request, batches, expect=True).plan


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    data: Any = None,
    forward: Forward | None = None,
    recover: Recover = (),
    example_inputs: Any = None,
    inplace: bool = False,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    seed: int | None = None,
    progress: bool = True,
    executor: Executor | None = None,
) -> Decomposition:
    """Decompose a model's layers as a plan says.

    >>> from tdecomp.api import plan
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> apply(model, plan(model, "svd", rank=4), progress=False).model[0]
    Chain(
      method='svd', rank=4
      (0): Linear(in_features=64, out_features=4, bias=False)
      (1): Linear(in_features=4, out_features=32, bias=True)
    )

    The other parameters are those of `decompose`.

    Parameters
    ----------
    model : nn.Module
        The one that was planned for, or another of the same architecture.
    plan : Plan
        From `tdecomp.plan`, edited or not.
    example_inputs : Tensor, tuple or dict, optional
        With these the result is timed against the original, in the mode that the plan's profile
        was taken in.

    Returns
    -------
    Decomposition
        With `.model`, `.report` and `.plan`.

    Raises
    ------
    TypeError
        If `plan` is no plan.
    ValueError
        If the plan does not fit the model, or a weight cannot be factorized; names the layer.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"apply: expected a Plan, got {type(plan).__name__}; tdecomp.plan(model, methods, "
            "rank=...) makes one, tdecomp.Plan.from_json(text) reads one"
        )
    steps = recovery_steps(recover)
    listed = check_optimizers(optimizers, inplace)
    example = None if example_inputs is None else Example.of(example_inputs, forward)
    check_executor(executor)
    bar = Progress(progress)
    batches = batches_or_moments(data, forward=forward, seed=seed, progress=bar)
    check_data(steps, batches)
    names = {name for row in plan for name in row.names}
    with restoring(model, seed=seed), opened_for(model, example, batches, names) as opened:
        sites = match_sites(find_sites(model), plan)
        wanted = {row.name for row in plan if row.method is not None}
        for name in wanted:
            check_weight(sites[name])
        moments = site_moments(
            model,
            list(sites.values()),
            wanted,
            batches,
            gradients=False,
            variants=use_variants(steps),
        )
        fits = {
            row.name: fits_before(sites[row.name], plan.decomposers[row.method], row.rank, moments)
            for row in plan
            if row.method is not None and row.rank is not None
        }
        return carry_out(
            model,
            Planned(plan, sites, moments, fits),
            steps,
            batches,
            example=example,
            timed=True,
            inplace=inplace,
            optimizers=listed,
            progress=bar,
            closed=opened.closed,
            executor=executor,
        )


def sensitivity(
    model: nn.Module | str | os.PathLike[str],
    methods: Methods = "dense",
    *,
    example_inputs: Any = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
    data: Any = None,
    forward: Forward | None = None,
    seed: int | None = None,
    progress: bool = True,
    executor: Executor | None = None,
) -> Sensitivity:
    """What each layer loses at each rank, by each method: the table to look at before choosing.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> table = sensitivity(model, "svd", progress=False)
    >>> [point.rank for point in table["2"]["svd"].points]
    [1, 2, 3, 4, 5, 6, 7]

    These are the very candidates that a `Budget` chooses from. With the same `Moments` as data,
    a later plan finds the fits that were made here. Where samples are held out errors are theirs,
    at a few ranks and interpolated between them.

    The other parameters are those of `decompose`.

    Parameters
    ----------
    model : nn.Module or path
        A model, or a folder, as for `plan`.

    Returns
    -------
    Sensitivity
        A table, plain data, and a picture: `print(table)`, `table.to_dict()`, `table.plot()`.
    """
    check_executor(executor)
    bar = Progress(progress)
    filters = Filters(include, exclude, where)
    if isinstance(model, (str, os.PathLike)):
        refuse_for_folders(
            "sensitivity", filters, example_inputs=example_inputs, data=data, forward=forward
        )
        listed = listed_methods(methods)
        return folder_sensitivity(model, listed, filters, executor=executor, progress=bar)
    example = None if example_inputs is None else Example.of(example_inputs, forward)
    batches = batches_or_moments(data, forward=forward, seed=seed, progress=bar)
    with restoring(model, seed=seed), opened_for(model, example, batches):
        listed = listed_methods(methods)
        return measure_sensitivity(
            model, listed, filters, example, batches, progress=bar, executor=executor
        )
