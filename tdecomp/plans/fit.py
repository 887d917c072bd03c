"""What a row plans, carried out: the fit, the row with its errors, and the chain.

The fit itself is a job: plain data in, plain data out, done by any worker. The row and the chain
are made where the model is.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from torch import Tensor

from tdecomp.calibration.calibrate import unwatched
from tdecomp.calibration.estimate import Estimate
from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.calibration.moments import Moments
from tdecomp.decomposers.assemble import assemble
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization
from tdecomp.decomposers.fit_layer import FittedLayer, fit_layer, fit_size, measured
from tdecomp.decomposers.tied import factors_as, tied_chains
from tdecomp.layers.chain import Chain, Rank
from tdecomp.layers.kinds import check_registered
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.sites import Site
from tdecomp.plans.row import Row
from tdecomp.runtime.parallel import on_cpu, parallel_each
from tdecomp.runtime.progress import SILENT, Progress

# A fit, and its error on samples that are held out, or on those that it was fitted to.
Fit = tuple[FittedLayer, Estimate | None]


@dataclass(frozen=True)
class LayerData:
    """What a fit needs of a layer."""

    weight: Tensor
    spec: LayerSpec
    moments: LayerMoments | None

    @classmethod
    def of(cls, site: Site, moments: Moments | None) -> "LayerData":
        """The layer's weight, and what is known of its inputs; for the processor, in its memory.

        Gradients say which ranks to choose, and are as large as weights: no row has what they tell.
        """
        assert site.spec is not None
        seen = None if moments is None else moments.layers.get(site.name)
        known = None if seen is None else replace(seen, gradient=None)
        layer = cls(site.module.get_parameter("weight").detach(), site.spec, known)
        return layer.on_one_device() if on_cpu(layer.weight) else layer

    def on_one_device(self) -> "LayerData":
        """All of it where the weight is: a GPU may not hold the moments of all layers at once."""
        seen = self.moments
        return self if seen is None else replace(self, moments=seen.to(self.weight.device))


@dataclass(frozen=True)
class FitJob:
    """A layer to fit, with those that share its factors; of which a worker needs no model."""

    name: str
    layers: tuple[LayerData, ...]  # the one that is fitted, then those that follow
    method: Decomposer
    rank: Rank
    known: FittedLayer | None = None  # the fit, if it was made to choose ranks
    start: Factorization | None = None

    def __str__(self) -> str:
        return f"layer {self.name!r} ({self.layers[0].spec})"

    @property
    def work(self) -> int:
        """How many numbers the fit works on; 0 where a GPU does the work."""
        first = self.layers[0]
        return fit_size(first.weight, first.spec, first.moments)


@dataclass(frozen=True)
class Group:
    """Layers that share their factors, most often one alone; the first is the one that is fitted.

    With the fit and the draft that were made to choose its rank, if there are any.
    """

    sites: Sequence[Site]
    rows: Sequence[Row]
    method: Decomposer
    known: FittedLayer | None = None
    draft: FittedLayer | None = None

    def job(self, moments: Moments | None) -> FitJob:
        """What a worker needs to fit it."""
        name, rank, draft = self.rows[0].name, self.rows[0].rank, self.draft
        assert rank is not None
        layers = tuple(LayerData.of(site, moments) for site in self.sites)
        start = None if draft is None or self.known is not None else draft.factors
        return FitJob(name, layers, self.method, rank, self.known, start)


def fit_groups(
    groups: Sequence[Group],
    moments: Moments | None,
    title: str,
    progress: Progress = SILENT,
    executor: Executor | None = None,
) -> list[tuple[Row, Chain]]:
    """The finished row and the chain of every layer; fits run side by side, or on an executor."""
    jobs = [group.job(moments) for group in groups]
    of_job = dict(zip((job.name for job in jobs), groups, strict=True))
    found: list[tuple[Row, Chain]] = []
    errors = [0.0]

    def finish(job: FitJob, fits: list[Fit]) -> None:
        rows = _finished_group(of_job[job.name], moments, fits)
        found.extend(rows)
        of_weight, of_output = rows[0][0].weight_error, rows[0][0].output_error
        errors.append((of_weight if of_output is None else of_output) or 0.0)
        step.advance(f"error at most {max(errors):.3g}", work=job.work)

    def size(job: FitJob) -> int:
        return 0 if executor is not None and job.known is not None else job.work  # it stays here

    with progress.step(title, len(jobs), "layers", work=sum(job.work for job in jobs)) as step:
        parallel_each(fit, jobs, size=size, done=finish, executor=executor)
    return found


def fit(job: FitJob) -> list[Fit]:
    """The fit of each layer of the job; an error names the first."""
    check_registered(job.layers[0].spec, str(job))
    try:
        layers = [layer.on_one_device() for layer in job.layers]
        pairs = zip(_fits(job, layers), layers, strict=True)
        return [(mine, mine.held_out_error(layer.weight, layer.moments)) for mine, layer in pairs]
    except Exception as error:
        raise ValueError(
            f"{job}: {job.method.name} at rank {job.rank} failed with {type(error).__name__}: "
            f"{error}. Leave the layer alone with exclude=[{job.name!r}], or choose another method "
            "or rank for it"
        ) from error


def _fits(job: FitJob, layers: Sequence[LayerData]) -> list[FittedLayer]:
    first, method = layers[0], job.method
    fitted = job.known or fit_layer(
        first.weight, first.spec, method, job.rank, first.moments, job.start
    )
    found = [fitted]
    for layer in layers[1:]:
        weight, spec, seen = layer.weight, layer.spec, layer.moments
        factors = factors_as(fitted.factors, weight, spec, method, seen)
        found.append(measured(weight, spec, method, factors, seen))
    return found


def fit_rows(group: Group, moments: Moments | None = None) -> list[tuple[Row, Chain]]:
    """The same of one group, here and now."""
    return _finished_group(group, moments, fit(group.job(moments)))


def _finished_group(
    group: Group, moments: Moments | None, fits: Sequence[Fit]
) -> list[tuple[Row, Chain]]:
    """The rows with their errors and the time of the fits, and the chains for the layers."""
    found = [
        _finished(site, row, group.method, moments, fit)
        for site, row, fit in zip(group.sites, group.rows, fits, strict=True)
    ]
    if len(found) == 1:
        return found
    words = f"fitted as {group.rows[0].name!r}, which has the same weight"
    noted = [row if row.tied_to or row is found[0][0] else _noted(row, words) for row, _ in found]
    return list(zip(noted, tied_chains([chain for _, chain in found]), strict=True))


def _noted(row: Row, words: str) -> Row:
    return replace(row, note="; ".join(filter(None, (row.note, words))))


def _finished(
    site: Site, row: Row, method: Decomposer, moments: Moments | None, fit: Fit
) -> tuple[Row, Chain]:
    (fitted, estimate), rank = fit, row.rank
    assert site.spec is not None
    assert rank is not None
    notes = [row.note, *fitted.notes]
    if moments is not None and site.name not in moments:
        notes.append(f"fitted by its weights: {unwatched(site.spec) or 'no batch reached it'}")
    row = replace(
        row,
        weight_error=fitted.weight_error,
        note="; ".join(note for note in notes if note) or None,
        fit_seconds=fitted.seconds,
        component_norms=fitted.component_norms,
    )
    if estimate:
        row = replace(
            row,
            output_error=estimate.value,
            output_error_se=estimate.se,
            output_error_margin=estimate.margin,
        )
    return row, assemble(site.module, method, rank, fitted.factors, fitted.shift)
