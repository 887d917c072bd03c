"""`compress_to`: the smallest share of a model that keeps a quality."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tdecomp.calibration.moments import Moments
from tdecomp.calibration.opening import opened_for
from tdecomp.calibration.passes import Batches, batches_or_moments
from tdecomp.decomposers.registry import Methods, listed_methods
from tdecomp.model.batches import Forward, device_of
from tdecomp.model.example import Example
from tdecomp.model.filters import Filters
from tdecomp.model.sites import find_sites
from tdecomp.plans.make import Request
from tdecomp.quality.compression import UNITS, Compression
from tdecomp.quality.quality import Quality
from tdecomp.quality.search import EVERYTHING, Search
from tdecomp.recovery.steps import Recover, check_data, recovery_steps
from tdecomp.runtime.progress import Progress
from tdecomp.runtime.torch_state import restoring
from tdecomp.timing.measure import measure
from tdecomp.timing.profile import Profile


def compress_to(
    model: nn.Module,
    quality: Quality,
    methods: Methods = "auto",
    *,
    of: str = "macs",
    data: Any = None,
    recover: Recover = "refit",
    example_inputs: Any = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
    forward: Forward | None = None,
    profile: Profile | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Compression:
    """Find the smallest share of a model whose result, recovered, keeps a quality.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> x = torch.randn(512, 64)
    >>> y = model(x).detach()
    >>> closeness = lambda smaller: -((smaller(x) - y).square().mean() / y.var()).item()
    >>> quality = Quality(closeness, drop=0.1)
    >>> result = compress_to(model, quality, "svd", data=[x], progress=False)
    >>> 0.3 < result.share < 0.9, closeness(result.model) > -0.1
    (True, True)

    Each share is one `Budget`, decomposed and recovered anew; moments and fits are shared by all of
    them. A share will do if the quality of its own result is kept, with one standard error on top
    where the metric is noisy. That quality falls with the share is only taken for granted in
    choosing which to try: it is tried at most as often as evaluations are left, and until a share
    that will do is within 2% of one that will not.

    Parameters
    ----------
    model : nn.Module
        It is left as it is.
    quality : Quality
        The metric, what it may lose, and how often it is evaluated at most: 10 times, the two
        evaluations of the original included.
    methods, example_inputs, include, exclude, where, forward, profile, seed, progress
        As for `decompose`. Without `example_inputs` the first batch of `data` is taken for them.
    of : {"macs", "params", "latency"}
        What the share is of. Times are measured, see `Budget`.
    data : iterable of batches, Moments or Data
        Unlabelled inputs, as for `decompose`.
    recover : str, step or a sequence of them
        As for `decompose`; () for nothing.

    Returns
    -------
    Compression
        The `Decomposition` of the smallest share that will do, and all trials, as a table and as a
        picture. If none will do, its model is a copy of the original, and it says what came
        closest.

    Raises
    ------
    ValueError, TypeError
        If the metric fails, or returns what is no finite number: the message says for which share;
        if `Quality.at_least` is above the original's value; and for what `decompose` refuses.
    """
    if not isinstance(quality, Quality):
        raise TypeError(
            "compress_to: expected a Quality, such as tdecomp.Quality(metric, drop=0.5), got "
            f"{quality!r}"
        )
    if of not in UNITS:
        raise ValueError(f"compress_to: expected of to be one of {[*UNITS]}, got {of!r}")
    steps = recovery_steps(recover)
    bar = Progress(progress)
    batches = batches_or_moments(data, forward=forward, seed=seed, progress=bar)
    check_data(steps, batches)
    with restoring(model, seed=seed):
        filters = Filters(include, exclude, where)
        find_sites(model, filters)  # refuses what it must before the metric takes its time
        example = _example(model, example_inputs, forward, batches)
        if example is None and of != "params":
            raise ValueError(
                f"compress_to: {UNITS[of]} are those of one call of the model, got neither "
                "example_inputs nor batches; expected one of them, or of='params'"
            )
        request = Request(
            listed_methods(methods), EVERYTHING, filters, example, profile=profile,
            progress=bar,
        )  # fmt: skip
        with opened_for(model, example, batches):
            if of == "latency" and profile is None and example is not None:
                sites = list(find_sites(model, filters, example).values())
                times = measure(model, example, sites, request.methods, progress=bar)
                request = replace(request, profile=times)
            return Search(model, quality, of, request, steps, batches).run()


def _example(
    model: nn.Module, inputs: Any, forward: Forward | None, batches: Batches | Moments | None
) -> Example | None:
    """The example inputs that were given, or the first batch."""
    if inputs is not None:
        return Example.of(inputs, forward)
    if not isinstance(batches, Batches):
        return None
    given = batches.called_by("compress_to")
    given.require_several_passes("a search without example_inputs")
    return Example(next(given.on(device_of(model))), given.forward)
