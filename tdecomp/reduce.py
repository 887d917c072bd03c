"""From a decomposed model on to lower ranks, with training in between."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from tdecomp.calibration.calibrate import calibrate_layers, watchable
from tdecomp.calibration.data import Source
from tdecomp.calibration.moments import Moments
from tdecomp.decomposers.base import Decomposer, relative_error
from tdecomp.layers.chain import Chain, Rank
from tdecomp.layers.cost import chain_cost, total
from tdecomp.loss_curves.candidates import candidate, rank_options
from tdecomp.model.batches import Forward
from tdecomp.model.sites import Site
from tdecomp.model.surgery import copy_with, swap
from tdecomp.pipeline import check_optimizers
from tdecomp.plans.plan import Plan, planned_row
from tdecomp.plans.report import Report
from tdecomp.plans.row import Row
from tdecomp.ranks.base import Candidate, Choice, RankSelector
from tdecomp.ranks.fixed import ByLayer, Fixed, exceeds
from tdecomp.ranks.short_forms import get_selector
from tdecomp.result import Decomposition
from tdecomp.torch_state import undisturbed


def reduce_ranks(
    decomposition: Decomposition,
    *,
    rank: Any,
    data: Any = None,
    forward: Forward | None = None,
    max_batches: int | None = None,
    inplace: bool = False,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    progress: bool = True,
) -> Decomposition:
    """Lower the ranks of a decomposed model, trained since or not.

    >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    >>> result = tdecomp.decompose(model, "svd", rank=8, progress=False)
    >>> result = reduce_ranks(result, rank=4, progress=False)  # after some training, say
    >>> result.model[0].rank, result.plan["0"].rank
    (4, 4)

    Each chain's factors are multiplied back and fitted again at the new rank, by its own method,
    with data in the norm of what it sees now. Chains that the selector leaves alone stay.

    Parameters
    ----------
    decomposition : Decomposition
        What `decompose`, `apply` or this function returned.
    rank : int, tuple, float, str, RankSelector or dict
        As for `tdecomp.plan`; shares are of the chains and the model as they are now.
    data, forward, max_batches
        As for `tdecomp.apply`.
    inplace : bool
        Change `decomposition.model` itself, wholly or, on an error, not at all.
    optimizers : Optimizer or sequence of them
        Only with `inplace`; new parameters take the old ones' places.
    progress : bool
        Show bars.

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
    model, plan = decomposition.model, decomposition.plan
    listed = check_optimizers(optimizers, inplace)
    chains = {row.name: model.get_submodule(row.name) for row in plan if row.method is not None}
    if not chains or not all(isinstance(chain, Chain) for chain in chains.values()):
        raise ValueError(
            "reduce_ranks: the model has no chains where the plan has them; expected what "
            "decompose() or apply() returned, its layers still in place"
        )
    merged = {name: _merged(chain, plan.decomposers[plan[name].method or ""], plan[name])
              for name, chain in chains.items() if isinstance(chain, Chain)}  # fmt: skip
    source = Source(data, forward, max_batches, progress=progress)
    selector = get_selector(rank)
    moments = _moments(model, chains, source, gradients=selector.weighs_layers)
    candidates = _candidates(plan, merged, moments, selector.largest_share)
    rest = plan.after - total(c[0].before for c in candidates)
    _refuse_larger(selector, candidates)
    choices = selector.select(candidates, rest)

    replacements: dict[nn.Module, Chain] = {}
    rows = {row.name: row for row in plan}
    bar = tqdm(candidates, desc="reduce", unit="layer", disable=not progress)
    for (mine,), choice in zip(bar, choices, strict=True):
        old, row = chains[mine.layer], rows[mine.layer]
        if choice.rank is None or choice.rank == row.rank:
            continue
        assert isinstance(old, Chain)
        new, rows[mine.layer] = _refitted(old, merged[mine.layer], row, choice, plan, moments)
        replacements[old] = new
    edited = [replace(row, weight_error=None, output_error=None) for row in rows.values()]
    changed = model
    if inplace:
        swap(model, replacements, listed)
    else:
        changed = copy_with(model, replacements)
    return Decomposition(
        changed,
        Report(list(rows.values()), plan.everything_else),
        Plan(edited, plan.everything_else, plan.decomposers),
    )


def _merged(chain: Chain, decomposer: Decomposer, row: Row) -> nn.Module:
    """A stock layer with the kernel and the bias that the chain stands for."""
    assert chain.replaced is not None
    with undisturbed(_weight(chain[0]).device):
        factors = decomposer.factorization_of(chain, chain.replaced)
        if factors is None:
            raise ValueError(
                f"layer {row.name!r}: {decomposer.name} cannot tell the factors of its chain; "
                "expected a method that defines factors_of"
            )
        layer: nn.Module = chain.replaced.build(_weight(chain[0]).device, _weight(chain[0]).dtype)
        _weight(layer).copy_(factors.to_kernel())
        if isinstance(layer.bias, nn.Parameter):
            assert isinstance(chain[-1].bias, Tensor)
            layer.bias.copy_(chain[-1].bias)
            layer.bias.requires_grad_(chain[-1].bias.requires_grad)
    _weight(layer).requires_grad_(_weight(chain[0]).requires_grad)
    return layer.train(chain.training)


def _moments(
    model: nn.Module, chains: dict[str, nn.Module], source: Source, *, gradients: bool
) -> Moments | None:
    if source.data is None:
        return None
    if isinstance(source.data, Moments):
        raise ValueError(
            "reduce_ranks: moments of the original are not what the chains see now; expected "
            "batches"
        )
    watched = {
        name: chain
        for name, chain in chains.items()
        if isinstance(chain, Chain) and watchable(chain.replaced)
    }
    return calibrate_layers(
        model,
        watched,
        source.batches("reduce_ranks"),
        gradients=gradients,
        progress=source.progress,
    )


def _candidates(
    plan: Plan, merged: dict[str, nn.Module], moments: Moments | None, largest_share: float
) -> list[list[Candidate]]:
    sites = [
        Site(plan[name].names, layer, plan[name].layer, calls=plan[name].calls)
        for name, layer in merged.items()
    ]
    methods = [[plan.decomposers[plan[site.name].method or ""]] for site in sites]
    offers = rank_options(sites, methods, moments, largest_share)
    found = []
    for site, (decomposer,), offer in zip(sites, methods, offers, strict=True):
        row = plan[site.name]
        assert row.rank is not None
        assert row.layer is not None
        found.append([_limited(candidate(site, decomposer, offer), row, decomposer)])
    return found


def _limited(free: Candidate, row: Row, decomposer: Decomposer) -> Candidate:
    """The candidate with no more than the ranks that the chain has now."""
    current = row.rank
    assert current is not None
    assert row.layer is not None
    return replace(
        free,
        max_rank=current,
        before=chain_cost(decomposer.stages(row.layer, current), row.calls),
        options=lambda: [o for o in free.options() if not exceeds(o.rank, current)],
    )


def _refuse_larger(selector: RankSelector, candidates: Sequence[Sequence[Candidate]]) -> None:
    for (mine,) in candidates:
        named: RankSelector | None = selector
        if isinstance(selector, ByLayer):
            named = selector.selector_of((mine.layer, *mine.aliases))
        if isinstance(named, Fixed) and exceeds(named.for_candidate(mine), mine.max_rank):
            raise ValueError(
                f"layer {mine.layer!r}: rank {named.rank} is above its current one, "
                f"{mine.max_rank}; expected at most that: decompose the original for a larger one"
            )


def _refitted(
    old: Chain, layer: nn.Module, row: Row, choice: Choice, plan: Plan, moments: Moments | None
) -> tuple[Chain, Row]:
    """The chain at its new rank, and the row that says so."""
    rank: Rank | None = choice.rank
    spec = row.layer
    assert rank is not None
    assert spec is not None
    decomposer, weight = plan.decomposers[row.method or ""], _weight(layer)
    seen = None if moments is None else moments.layers.get(row.name)
    with undisturbed(weight.device):
        second = None if seen is None else seen.second_moments()
        fitted = decomposer.factorize(weight, spec, rank, second)
        kernel = fitted.to_kernel()
        gone = weight.double() - kernel.double()
        shift = seen.mean_output(gone) if seen is not None and spec.bias else None
        chain = decomposer.assemble(layer, fitted, rank, shift)
        lost = None if seen is None else seen.output_error(weight, kernel, second)
        changed = planned_row(row, decomposer, rank)
        return chain.train(old.training), replace(
            changed,
            note=f"from rank {row.rank}",
            expected_error=choice.error,
            weight_error=relative_error(weight, kernel),
            output_error=lost,
        )


def _weight(layer: nn.Module) -> nn.Parameter:
    assert isinstance(layer.weight, nn.Parameter)
    return layer.weight
