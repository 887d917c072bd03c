"""The rows of a table: what a choice makes of each site, counted once where weights are shared."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch.nn.parameter import is_lazy

from tdecomp.layers.cost import Cost, total
from tdecomp.loss_curves.offers import Offer
from tdecomp.model.sites import Site
from tdecomp.model.ties import leader
from tdecomp.plans.expected_loss import ExpectedLoss
from tdecomp.plans.left_alone import largest_left_alone
from tdecomp.plans.plan import planned_row
from tdecomp.plans.row import Row
from tdecomp.ranks.base import Choice, UnmetError


def settled_choices(
    offers: Sequence[Offer], chosen: Sequence[Choice], *, expect: bool
) -> dict[str, Choice]:
    """By its name the choice for each layer, and for those that share its factors.

    With `expect` it has the error to expect, which may take further fits.
    """
    choices: dict[str, Choice] = {}
    for offer, choice in zip(offers, chosen, strict=True):
        name, losses = offer.site.name, offer.losses
        choices[name] = replace(choice, error=None)
        if expect and choice.candidate is not None and choice.rank is not None:
            # Exact or a bound where the method has one; else what the selector's own fits say.
            error = losses.expected_error(choice.candidate.decomposer, choice.rank)
            choices[name] = choice if error is None else replace(choice, error=error)
        # Without data, layers that have one weight lose the same of it.
        error = choices[name].error if losses.moments is None else None
        others = (other for other in offer.site.tied if other != name)
        choices |= dict.fromkeys(others, replace(choices[name], error=error))
    return choices


def rows_of(
    sites: Sequence[Site],
    choices: Mapping[str, Choice],
    seconds: Mapping[str, tuple[float, float]] | None = None,
) -> list[Row]:
    """A row for each site; `seconds` are those of the layer and of what is chosen for it."""
    counted: set[int] = set()
    kinds = {site.name: site.spec is not None and site.spec.lookup for site in sites}
    return [
        _row(site, choices[site.name], counted, seconds or {}, _tie(site, kinds)) for site in sites
    ]


def row_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that are decomposed, together where they share factors.

    In each group the one comes first that the others are fitted as.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.method is not None:
            groups.setdefault(row.tied_to or row.name, []).append(row)
    return [_leader_first(group) for group in groups.values()]


def _leader_first(rows: Sequence[Row]) -> list[Row]:
    first = rows[leader([row.layer for row in rows if row.layer is not None])]
    return [first, *(row for row in rows if row is not first)]


def expected_loss(chosen: Sequence[Choice], least: float) -> ExpectedLoss:
    """The sum of what is lost, beside its lower bound."""
    lost = sum(choice.loss for choice in chosen)
    # Round-off may lift the bound a little above what is lost, or drop it below 0.
    return ExpectedLoss(lost, min(max(least, 0.0), lost))


def with_largest(
    unmet: UnmetError, sites: Sequence[Site], left_alone: Mapping[str, Choice], whole: Cost
) -> UnmetError:
    """The error, and in words what is left alone and costs most in its unit, and why."""
    counted: set[int] = set()
    rows = [_row(site, left_alone.get(site.name, Choice()), counted, {}) for site in sites]
    rest = whole - total(row.before for row in rows)
    found = [
        (row.before, repr(row.name), row.reason or "") for row in rows if row.name in left_alone
    ]
    found.append((rest, "everything else", "no layer's, such as attention's scores"))
    words = largest_left_alone(found, whole, unmet.unit)
    words = f". Left alone, {words}" if words else ""
    return UnmetError(f"{unmet}{words}", unmet.unit, unmet.least)


def _row(
    site: Site,
    choice: Choice,
    counted: set[int],
    seconds: Mapping[str, tuple[float, float]],
    tie: tuple[str | None, bool] = (None, False),
) -> Row:
    """The site's row; a parameter that it shares with an earlier row is counted there only."""
    own = {id(p): p.numel() for p in site.parameters if not is_lazy(p)}
    params = sum(numel for key, numel in own.items() if key not in counted)
    counted.update(own)
    macs = site.macs
    latency_before, latency_after = seconds.get(site.name, (None, None))
    row = Row(
        site.name, site.names, site.spec, params, params, macs, macs, reason=choice.reason,
        note=choice.note, expected_error=choice.error, latency_before=latency_before,
        latency_after=latency_after, calls=site.calls,
        tied_to=tie[0], shares_all=tie[1],
    )  # fmt: skip
    if choice.candidate is None or choice.rank is None:
        return row
    return planned_row(row, choice.candidate.decomposer, choice.rank)


def _tie(site: Site, kinds: Mapping[str, bool]) -> tuple[str | None, bool]:
    """The first row that shares factors with this later one, and whether one is of its kind.

    `kinds` says of each row whether it is a lookup.
    """
    before = site.tied[: site.tied.index(site.name)] if site.tied and not site.reason else ()
    return next(iter(before), None), any(kinds[name] == kinds[site.name] for name in before)
