"""From a decomposed model on to lower ranks, with training in between."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tdecomp.afterwards.recompose import layer_of
from tdecomp.calibration.calibrate import calibrate_layers, watchable
from tdecomp.calibration.moments import Moments
from tdecomp.calibration.passes import Batches, batches_or_moments
from tdecomp.checkpoint.pretrained import remember
from tdecomp.layers.chain import Chain, Rank
from tdecomp.layers.cost import total
from tdecomp.layers.spec import LayerSpec
from tdecomp.loss_curves.offers import offer_ranks
from tdecomp.model.batches import Forward
from tdecomp.model.sites import Site
from tdecomp.model.surgery import copy_with, swap
from tdecomp.model.ties import leader
from tdecomp.pipeline import check_optimizers
from tdecomp.plans.data_notes import data_notes
from tdecomp.plans.fit import Group, fit_groups
from tdecomp.plans.plan import Plan, planned_row
from tdecomp.plans.report import Report
from tdecomp.plans.row import Row
from tdecomp.ranks.base import Candidate, Choice, RankSelector, checked_choices
from tdecomp.ranks.fixed import ByLayer, Fixed, exceeds
from tdecomp.ranks.short_forms import get_selector
from tdecomp.result import Decomposition
from tdecomp.runtime.executors import check_executor
from tdecomp.runtime.progress import Progress
from tdecomp.runtime.torch_state import restoring


def reduce_ranks(
    decomposition: Decomposition,
    *,
    rank: Any,
    data: Any = None,
    forward: Forward | None = None,
    inplace: bool = False,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    seed: int | None = None,
    progress: bool = True,
    executor: Executor | None = None,
) -> Decomposition:
    """Lower the ranks of a decomposed model, trained since or not.

    >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    >>> result = tdecomp.decompose(model, "svd", rank=8, progress=False)
    >>> result = reduce_ranks(result, rank=4, progress=False)  # after some training, say
    >>> result.model[0].rank, result.plan["0"].rank
    (4, 4)

    Each chain's factors are multiplied back and fitted again at the new rank, by its own method,
    with data in the norm of the inputs it gets now. Chains that the selector leaves alone stay.

    Parameters
    ----------
    decomposition : Decomposition
        From `decompose`, `apply` or an earlier `reduce_ranks`.
    rank : int, tuple, float, str, RankSelector or dict
        As for `tdecomp.plan`; shares are of the chains and the model as they are now.
    data, forward, seed, progress, executor
        As for `tdecomp.decompose`; moments of the original say nothing of the chains.
    inplace : bool
        Change `decomposition.model` itself, wholly or, on an error, not at all.
    optimizers : Optimizer or sequence of them
        Only with `inplace`; new parameters take the old ones' places.

    Returns
    -------
    Decomposition
        Its plan and report are against the original; `weight_error` and `output_error` are those
        of this step.

    Raises
    ------
    ValueError
        If a rank is above a chain's current one, or nothing was decomposed.
    """
    if not isinstance(decomposition, Decomposition):
        words = f"expected what decompose() returned, got {type(decomposition).__name__}"
        raise TypeError(f"reduce_ranks: {words}")
    model, plan = decomposition.model, decomposition.plan
    listed = check_optimizers(optimizers, inplace)
    check_executor(executor)
    selector = get_selector(rank)
    bar = Progress(progress)
    batches = batches_or_moments(data, forward=forward, seed=seed, progress=bar)
    with restoring(model, seed=seed):
        chains = _chains(model, plan)
        sites = _grouped({name: _site(chain, plan[name]) for name, chain in chains.items()}, plan)
        moments = _moments(model, chains, batches, gradients=selector.weighs_layers)
        candidates = _candidates(plan, chains, sites, moments, selector, bar, executor)
        rest = plan.after - total(mine.before for mine in candidates)
        choices = checked_choices(selector, [[mine] for mine in candidates], rest)
        replacements: dict[nn.Module, Chain] = {}
        rows = {row.name: row for row in plan}
        pairs = zip(candidates, choices, strict=True)
        todo = [_to_fit(mine, choice, sites, plan) for mine, choice in pairs]
        changed = [group for group in todo if group is not None]
        for row, new in fit_groups(changed, moments, "reduce", bar, executor):
            rows[row.name], old = row, chains[row.name]
            replacements[old] = new.train(old.training)
        unfitted = [
            replace(row, weight_error=None, output_error=None, output_error_se=None,
                    output_error_margin=None)
            for row in rows.values()
        ]  # fmt: skip
        lower = Plan(unfitted, plan.everything_else, plan.decomposers)
        result = Decomposition(
            model if inplace else copy_with(model, replacements),
            Report(
                list(rows.values()),
                plan.everything_else,
                plan.decomposers,
                notes=data_notes(rows.values(), moments),
            ),
            lower,
        )
        with ExitStack() as undo:
            undo.callback(remember(result.model, lower))
            if inplace:
                swap(model, replacements, listed)
            undo.pop_all()
        return result


def _to_fit(mine: Candidate, choice: Choice, sites: Mapping[str, Site], plan: Plan) -> Group | None:
    """The chains to fit again with this one, as they share its factors; None if it stays."""
    rank, method = choice.rank, mine.decomposer
    if rank is None or rank == plan[mine.layer].rank:
        return None
    group = _group(sites[mine.layer])
    rows = [
        replace(
            planned_row(plan[site.name], method, rank),
            note=f"from rank {plan[site.name].rank}",
            expected_error=choice.error if site.name == mine.layer else None,
        )
        for site in group
    ]
    return Group([sites[site.name] for site in group], rows, method)


def _chains(model: nn.Module, plan: Plan) -> dict[str, Chain]:
    chains = {row.name: model.get_submodule(row.name) for row in plan if row.method is not None}
    found = {name: chain for name, chain in chains.items() if isinstance(chain, Chain)}
    if not found or len(found) < len(chains):
        raise ValueError(
            "reduce_ranks: the model has no chains where the plan has them; expected what "
            "decompose() or apply() returned, its layers still in place"
        )
    return found


def _site(chain: Chain, row: Row) -> Site:
    """A layer with the kernel and the bias that the chain stands for."""
    layer = layer_of(row.name, chain)
    if LayerSpec.of(layer) != row.layer:
        raise ValueError(
            f"reduce_ranks: layer {row.name!r} stands for {LayerSpec.of(layer)}, in the plan for "
            f"{row.layer}, as after fuse_batchnorm or resizing; expected the layers that were "
            "decomposed: reduce first, or decompose what tdecomp.recompose returns"
        )
    return Site(row.names, layer, row.layer, calls=row.calls)


def _grouped(sites: dict[str, Site], plan: Plan) -> dict[str, Site]:
    """The sites; each that shares its factors knows all that do, first what they are fitted as."""
    groups: dict[str, list[Site]] = {}
    for name, site in sites.items():
        groups.setdefault(plan[name].tied_to or name, []).append(site)
    for group in (found for found in groups.values() if len(found) > 1):
        first = group[leader([site.spec for site in group if site.spec is not None])]
        ordered = (first, *(site for site in group if site is not first))
        sites |= {site.name: replace(site, group=ordered) for site in group}
    return sites


def _group(site: Site) -> tuple[Site, ...]:
    return site.group or (site,)


def _moments(
    model: nn.Module, chains: dict[str, Chain], data: Batches | Moments | None, *, gradients: bool
) -> Moments | None:
    if data is None:
        return None
    if isinstance(data, Moments):
        raise ValueError(
            "reduce_ranks: moments of the original are not what the chains see now; expected "
            "batches"
        )
    watched = {name: chain for name, chain in chains.items() if watchable(chain.replaced)}
    batches = data.called_by("reduce_ranks")
    return calibrate_layers(model, watched, batches, gradients=gradients)


def _candidates(
    plan: Plan,
    chains: dict[str, Chain],
    sites: dict[str, Site],
    moments: Moments | None,
    selector: RankSelector,
    progress: Progress,
    executor: Executor | None,
) -> list[Candidate]:
    """For each chain its own method, at no more than the ranks it has now."""
    able = [
        (site, [chains[name].decomposer])
        for name, site in sites.items()
        if site.name == _group(site)[0].name
    ]
    offers = offer_ranks(
        able, moments, curves=selector.weighs_layers, progress=progress, executor=executor
    )
    candidates = [_limited(offer.candidates[0], plan[offer.site.name]) for offer in offers]
    for mine in candidates:
        named: RankSelector | None = selector
        if isinstance(selector, ByLayer):
            named = selector.selector_of((mine.layer, *mine.aliases))
        if isinstance(named, Fixed) and exceeds(named.for_candidate(mine), mine.max_rank):
            raise ValueError(
                f"layer {mine.layer!r}: rank {named.rank} is above its current one, "
                f"{mine.max_rank}; expected at most that: decompose the original for a larger one"
            )
    return candidates


def _within(ranks: Mapping[Rank, float] | None, current: Rank) -> dict[Rank, float] | None:
    """Those that are at most the current one, which ends them: no rank loses less."""
    if ranks is None:
        return None
    return {r: error for r, error in ranks.items() if not exceeds(r, current)} | {current: 0.0}


def _limited(free: Candidate, row: Row) -> Candidate:
    current = row.rank
    assert current is not None
    assert row.layer is not None
    return replace(
        free,
        max_rank=current,
        before=free.cost(current),
        options=lambda: [o for o in free.options() if not exceeds(o.rank, current)],
        best_ranks=lambda: _within(free.best_ranks(), current),
    )
