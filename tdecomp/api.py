"""The public functions."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tdecomp.calibration.augment import Augment, flip_and_shift
from tdecomp.calibration.data import Source
from tdecomp.decomposers.methods import Methods
from tdecomp.model.batches import Forward
from tdecomp.model.filters import Filters
from tdecomp.pipeline import check_optimizers, run
from tdecomp.plans.make import as_patterns, plan_from
from tdecomp.plans.plan import Plan, match_sites
from tdecomp.ranks.budget import Budget
from tdecomp.recovery.steps import Steps
from tdecomp.result import Decomposition
from tdecomp.timing.clock import Clock
from tdecomp.timing.profile import Profile


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
    filters = Filters(as_patterns(include), as_patterns(exclude), where)
    clock = Clock(profile, only_if_faster)
    planned, moments = plan_from(
        model, methods, rank, example_inputs, filters, source, allow_expansion, clock, expect=False
    )
    timed = planned.speed is not None or isinstance(rank, Budget)
    inputs = example_inputs if timed else None
    return run(model, planned, moments, source, steps, inplace, listed, inputs)


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

    >>> from tdecomp.api import plan
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
    return run(model, plan, moments, source, steps, inplace, listed, example_inputs)


def plan(
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
    profile: Profile | None = None,
    only_if_faster: bool = False,
    progress: bool = True,
) -> Plan:
    """Choose a method and a rank for every layer, without changing anything.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> plan(model, "svd", rank=4)["0"].params_after
    416

    Parameters
    ----------
    model : nn.Module
    methods : str, Decomposer or a sequence of them
        With several, the first that can take a layer is used, unless the ranks are a `Budget`,
        which finds the best for each layer. "auto" is all of them, "dense" those without
        depthwise layers: svd, lowrank, spatial and tucker2.
    rank : int, tuple, float, str, RankSelector or dict
        An int is a rank (for Tucker-2 the same rank twice; a pair is taken as it is), a float
        below 1 that fraction of the largest useful rank, "vbmf" and "breakeven" name selectors;
        see `tdecomp.Ratio`, `VBMF`, `Energy`. A dict gives layers, by name or glob, each their own.
    example_inputs : Tensor, tuple or dict, optional
        One call of the model: a tuple is positional, a dict keyword arguments. MACs are those of
        this call, the batch included; without it only parameters are counted.
    include, exclude : str or sequence of str
        Names, globs, or the name of a container for all that it holds.
    where : callable ``(module, name) -> bool``, optional
    min_channels, min_features : int
        Convolutions and Linear layers narrower than this, on either side, are left alone.
    allow_expansion : bool
        Decompose even where this saves no MACs.
    data : Moments or iterable of batches, optional
        What the layers see, without labels: errors are then those of the layers' outputs.
    forward, max_batches, max_memory
        How the model is called with a batch, and limits; see `tdecomp.calibrate`.
    profile : Profile, optional
        Measured times, from `tdecomp.profile`: rows then have them, the plan says how long the
        whole model will take, in the profile's mode, and a Budget prefers ranks that the machine
        likes. Budget(latency=...) and `only_if_faster` take a profile of their own if none is
        given, in eager mode and the model's layout.
    only_if_faster : bool
        Leave alone each layer whose chain is not measurably faster.
    progress : bool
        Show bars.

    Returns
    -------
    Plan
        A row for every Linear and convolution; those left alone say why.

    Raises
    ------
    ValueError
        For a rank, a method, a filter, example inputs or weights that cannot be; the message
        names the layer, what was got, what was expected and the remedy.
    """
    filters = Filters(as_patterns(include), as_patterns(exclude), where)
    source = Source(data, forward, max_batches, max_memory, progress)
    clock = Clock(profile, only_if_faster)
    planned, _ = plan_from(
        model, methods, rank, example_inputs, filters, source, allow_expansion, clock, expect=True
    )
    return planned
