"""What each rank would lose, against fits made one by one."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.calibration.moments import LayerMoments
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.fit_layer import factorize
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.loss_curves.curve import layer_curves
from tdecomp.loss_curves.losses import LayerLosses, whole_loss
from tdecomp.loss_curves.offers import OfferedLayer, candidate, layer_losses, offer_ranks
from tdecomp.model.filters import Filters
from tdecomp.model.sites import find_sites
from tests.linalg.recorded import Recorded
from tests.recovery.networks import QUIET, convnet, images, mlp, vectors, whole


def losses_of(model, name, moments=None, inputs=None):
    sites = find_sites(model, Filters(), inputs).values()
    (found,) = layer_losses([site for site in sites if site.name == name], moments)
    return found


def methods_of(*names):
    return [get_decomposer(name) for name in names]


class Counted(tdecomp.CP):
    """CP that counts its fits."""

    name = "counted"

    def __init__(self, *args, worse=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "ranks", [])
        object.__setattr__(self, "worse", worse)

    def fit(self, kernel, rank, start=None, *, draft=False):
        self.ranks.append(rank)
        return super().fit(kernel, rank, start, draft=draft).scaled(self.worse)


def test_losses_are_the_errors_of_the_outputs_in_the_norm_of_their_gradients():
    model, batches = convnet().double(), images(dtype=torch.float64)
    moments = tdecomp.calibrate(model, whole(batches), **QUIET)
    layer, seen = model[3], moments["3"]
    losses = losses_of(model, "3", moments)
    decomposer = get_decomposer("lowrank")
    nested = losses.nested(decomposer)
    assert len(nested) == 13
    assert [loss for loss, _ in nested] == sorted((loss for loss, _ in nested), reverse=True)
    for rank in (1, 4, 12):
        second = seen.second_moments()
        kernel = factorize(decomposer, layer.weight, seen.spec, rank, second).to_kernel()
        gone = (layer.weight - kernel).detach().flatten(1)
        lost = torch.trace(seen.gradient @ gone @ second[0].matrix @ gone.T)
        loss, error = nested[rank]
        assert loss == pytest.approx(float(lost), rel=1e-6, abs=1e-9)
        share, _ = seen.lost(layer.weight, layer.weight - kernel, second)
        assert error == pytest.approx(share, rel=1e-6, abs=1e-9)
        # Fits lean a little less on few samples than those that lose least of them.
        fitted = losses.fitted(decomposer, rank)
        assert fitted == pytest.approx((loss, error), rel=0.05, abs=1e-8)
        assert fitted[1] >= error * (1 - 1e-6) - 1e-12  # at full rank both are round-off
        # Where nothing is held out:
        assert losses.expected_error(decomposer, rank) == pytest.approx(fitted[1], rel=1e-6)


def test_one_decomposition_of_the_smaller_side_tells_what_every_rank_loses():
    model = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8))
    moments = tdecomp.calibrate(model, vectors(), **QUIET)
    for name, size in (("0", 16), ("2", 8)):
        losses = losses_of(model, name, moments)
        with Recorded() as seen:
            losses.nested(get_decomposer("svd"))
        assert moments[name].gradient is not None
        assert seen.decomposed == [size]


def test_nothing_as_large_as_a_table_is_made_in_float64():
    table = nn.Embedding(4200, 1024)
    (site,) = find_sites(table).values()
    often = torch.arange(4200.0).double()[None] / sum(range(4200))
    seen = LayerMoments(site.spec, 10**6, often)
    losses = LayerLosses(table.weight.detach(), site.spec, seen)
    with Recorded() as made:
        curves = layer_curves(losses, methods_of("svd"))
    assert made.largest < table.weight.numel()
    about = table.weight.detach().double() - often @ table.weight.detach().double()
    variance = (often @ about.square()).sum().item()
    assert seen.output_variance(table.weight) == pytest.approx(variance, rel=1e-9)
    assert curves["svd"].points


class ByWeights(tdecomp.SVD):
    """Knows nothing of data."""

    name = "by-weights"
    fit_to = Decomposer.fit_to


@pytest.mark.parametrize("gradients, method", [(True, ByWeights()), (False, tdecomp.SVD())])
def test_losses_that_no_gradients_weight_are_in_the_unit_of_those_that_some_do(gradients, method):
    model = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8))
    moments = tdecomp.calibrate(model, vectors(), **QUIET)
    if not gradients:
        moments.layers["2"] = replace(moments["2"], gradient=None)
    methods = [tdecomp.SVD()], [method]
    able = [*zip(find_sites(model).values(), methods, strict=True)]
    offers = offer_ranks(able, moments, curves=True)
    wholes = [whole_loss(o.site.module.weight, moments[o.site.name]) for o in offers]
    known = [whole for whole in wholes if whole is not None]
    assert offers[1].losses.unit == pytest.approx(sum(known) / len(known))
    point = offers[1].curves[method.name].points[0]
    share = point.error if not gradients else point.error**2
    assert point.loss == pytest.approx(share * offers[1].losses.unit)


def test_without_data_they_are_those_of_the_weights():
    model = mlp()
    losses = losses_of(model, "2")
    squares = torch.linalg.svdvals(model[2].weight.detach().double()) ** 2
    for rank in (1, 7, 19):
        share = float(squares[rank:].sum() / squares.sum())
        decomposer = get_decomposer("svd")
        assert losses.nested(decomposer)[rank] == pytest.approx((share, share), rel=1e-6)
        assert losses.expected_error(decomposer, rank) == pytest.approx(math.sqrt(share))
        assert losses.fitted(decomposer, rank) == pytest.approx((share, share), rel=1e-4)


@pytest.mark.parametrize("data", [False, True])
def test_the_error_of_tucker2_is_a_bound(data):
    model = convnet()
    moments = tdecomp.calibrate(model, whole(images()), **QUIET) if data else None
    for rank in [(1, 1), (3, 5), (8, 8), (12, 12)]:
        plan = tdecomp.plan(
            model, "tucker2", rank=rank, include="3", data=moments, allow_expansion=True, **QUIET
        )
        row = tdecomp.apply(model, plan, data=moments, **QUIET).report["3"]
        real = row.output_error if data else row.weight_error
        assert real <= 1.02 * plan["3"].expected_error + 1e-6


@pytest.mark.parametrize("method", ["svd", "lowrank", "spatial"])
@pytest.mark.parametrize("data", [False, True])
def test_the_errors_of_nested_methods_are_exact(method, data):
    model, name = (mlp(), "2") if method == "svd" else (convnet(), "3")
    batches = vectors() if method == "svd" else images()
    moments = tdecomp.calibrate(model, batches, **QUIET) if data else None
    plan = tdecomp.plan(model, method, rank=3, include=name, data=moments, **QUIET)
    row = tdecomp.apply(model, plan, data=moments, **QUIET).report[name]
    expected = plan[name].expected_error
    if method == "spatial" and data:
        assert expected is None or row.output_error <= 1.05 * expected
        return
    assert expected == pytest.approx(row.output_error if data else row.weight_error, rel=1e-3)


@pytest.mark.parametrize("method", ["lowrank", "spatial", "tucker2", "cp", "cp-separable"])
def test_options_save_something_and_fall(method):
    model, batches = convnet(), images()
    moments = tdecomp.calibrate(model, batches, **QUIET)
    losses = losses_of(model, "3", moments, batches[0])
    options = layer_curves(losses, methods_of(method))[method].points
    assert 1 < len(options) <= 48
    for smaller, larger in itertools.pairwise(options):
        assert smaller.cost.amount < larger.cost.amount < losses.before.amount
        assert larger.loss <= smaller.loss
        assert larger.error <= smaller.error
    assert all(math.isfinite(o.loss) and o.loss >= 0 and o.error >= 0 for o in options)
    middle = options[len(options) // 2]
    fitted = losses.fitted(get_decomposer(method), middle.rank)
    assert middle.loss == pytest.approx(fitted[0], rel=0.35)


def test_layers_without_gradients_count_as_much_as_the_others_do():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    batches = vectors()
    moments = tdecomp.calibrate(model, batches, **QUIET)
    del moments.layers["0"]
    sites = list(find_sites(model).values())
    decomposers = [get_decomposer("svd")]
    unknown, known = layer_losses(sites, moments)
    whole = known.nested(decomposers[0])[0][0]
    assert whole > 0
    assert unknown.nested(decomposers[0])[0] == pytest.approx((whole, 1.0))
    # With that layer alone there is nothing to compare with: a share is a share.
    (alone,) = layer_losses(sites[:1], moments)
    assert alone.nested(decomposers[0])[0] == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    "channels, kernel_size, methods, pointless",
    [
        (128, 3, ["cp", "cp-separable"], {"cp-separable"}),
        # Two depthwise layers of three weights each for one of nine are worth something here.
        (16, 3, ["cp", "cp-separable"], set()),
        (128, 3, ["cp-separable", "lowrank"], set()),
        (32, 1, ["svd", "cp", "cp-separable"], {"cp", "cp-separable"}),
        (32, 1, ["cp"], set()),
        (32, 1, ["tucker2", "lowrank", "spatial"], {"tucker2", "spatial"}),
        (32, 3, ["tucker2", "lowrank", "spatial"], set()),
    ],
)
def test_a_method_is_not_tried_beside_one_that_contains_it(
    channels, kernel_size, methods, pointless
):
    torch.manual_seed(0)
    losses = losses_of(nn.Sequential(nn.Conv2d(channels, channels, kernel_size)), "0")
    curves = layer_curves(losses, methods_of(*methods))
    contained = {n for n, c in curves.items() if "at the same cost" in (c.note or "")}
    assert contained == pointless
    assert not any(curves[name].points for name in pointless)


@pytest.mark.parametrize("channels, stride", [((24, 32), 1), ((32, 24), 2)])
def test_large_ranks_of_cp_are_foreseen(channels, stride):
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, 3, stride=stride, padding=1)
    inputs, method = torch.randn(1, channels[0], 8, 8), get_decomposer("cp")
    losses = losses_of(nn.Sequential(layer), "0", inputs=inputs)
    curve = layer_curves(losses, [method])["cp"]
    options = curve.points
    assert max(curve.fitted) < 0.5 * max(option.rank for option in options)
    assert [o.loss for o in options] == sorted((o.loss for o in options), reverse=True)
    for option in options:
        if option.cost.amount < 0.6 * losses.before.amount:
            _, share = losses.fitted(method, option.rank)
            assert option.error == pytest.approx(math.sqrt(share), rel=0.2)


class Unlucky(tdecomp.CP):
    """Fails above a rank, as a fit that degenerates does."""

    name = "unlucky"
    limit = 0

    def fit(self, kernel, rank, start=None, *, draft=False):
        if rank > self.limit:
            raise ValueError("it degenerates")
        return super().fit(kernel, rank, start, draft=draft)


def test_a_fit_that_fails_is_no_option():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3)
    (site,) = find_sites(layer).values()
    method = Unlucky(l2_reg=0.0)  # with a ridge large ranks are foreseen, not tried
    for limit, most in ((0, 0), (16, 16)):
        Unlucky.limit = limit
        losses = LayerLosses(layer.weight, site.spec, None)
        options = layer_curves(losses, [method])["unlucky"].points
        assert all(option.rank <= most for option in options)
        assert bool(options) == bool(most)
    Unlucky.limit = 0
    with pytest.raises(ValueError, match=r"cannot be met: the least is 1.0000"):
        tdecomp.plan(layer, Unlucky(), rank=tdecomp.Budget(params=0.5), **QUIET)


def test_a_dominated_method_is_fitted_once_only():
    method = Counted(worse=3.0)
    curves = layer_curves(losses_of(convnet(), "3"), [get_decomposer("lowrank"), method])
    assert curves["counted"].points == ()
    assert "lowrank loses less" in curves["counted"].note
    assert len(method.ranks) == 1
    assert curves["lowrank"].points


@pytest.mark.parametrize("ranks", [(1, 1), (2, 9), (6, 3), (12, 12)])
def test_no_fit_loses_less_than_singular_values_say(ranks):
    losses, tucker2 = losses_of(convnet(), "3"), get_decomposer("tucker2")
    loss, _ = losses.fitted(tucker2, ranks)
    assert losses.least(tucker2, ranks) <= loss + 1e-6
    assert losses.least(get_decomposer("lowrank"), 3) is None


def test_singular_values_say_that_a_method_is_dominated_without_a_fit():
    # A matrix: Tucker-2 is the SVD with a core that costs and gains nothing.
    losses = losses_of(nn.Sequential(nn.Conv2d(96, 80, 1, bias=False)), "0")
    tucker2, svd = methods_of("tucker2", "svd")
    curves = layer_curves(losses, [tucker2, svd])
    assert not curves["tucker2"].points
    assert curves["svd"].points
    assert all(losses.known_fit(tucker2, (r, r), draft=True) is None for r in range(1, 81))


class Listed(tdecomp.SVD):
    """Not hashable, as a plain dataclass with options is not."""

    name = "listed"
    __hash__ = None


@pytest.mark.parametrize("rank", [3, tdecomp.Budget(params=0.5)], ids=str)
def test_decomposers_need_not_be_hashable(rank):
    plan = tdecomp.plan(mlp(), Listed(), rank=rank, data=vectors(), **QUIET)
    assert any(row.method == "listed" for row in plan)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    def ranks(factor):
        model = mlp()
        with torch.no_grad():
            for layer in model[::2]:
                layer.weight.mul_(factor)
        plan = tdecomp.plan(model, "svd", rank=tdecomp.Budget(params=0.5), **QUIET)
        return [row.rank for row in plan]

    assert ranks(scale) == ranks(1.0)


def test_a_zero_layer_loses_nothing():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    for data in (None, vectors()):
        plan = tdecomp.plan(model, "svd", rank=tdecomp.Budget(params=0.5), data=data, **QUIET)
        assert plan["2"].expected_error == 0.0


def test_a_candidate_computes_losses_when_asked_and_once():
    method = Counted()
    losses = losses_of(convnet(), "3")
    layer = OfferedLayer.of(find_sites(convnet())["3"], rounded=False)
    one = candidate(layer, method, losses, {})
    assert method.ranks == []
    assert one.errors() is None
    assert one.error_at(3) == one.error_at(3) > 0
    assert method.ranks == [3]
    assert one.options() == ()
    assert one.before == losses.before
    assert one.cost(3) == losses.cost(method, 3)
    assert not one.by_outputs


def test_a_fit_that_does_not_iterate_is_not_made_again():
    """What was fitted to choose the rank is the result."""
    ranks = []

    class Plain(tdecomp.SVD):
        name = "plain"

        def fit(self, kernel, rank):
            ranks.append(rank)
            return super().fit(kernel, rank)

        def lost_at_every_rank(self, *_):
            return None

    layer = nn.Linear(32, 32)
    budget = tdecomp.Budget(params=0.5)
    result = tdecomp.decompose(layer, Plain(), rank=budget, example_inputs=None, **QUIET)
    rank = result.report[""].rank
    assert ranks.count(rank) == 1
    assert len(ranks) == len(set(ranks))


@pytest.mark.parametrize("method, rank", [("svd", 3), ("tucker2", (3, 5))])
def test_what_is_expected_is_the_error_of_samples_that_are_held_out(method, rank):
    model = convnet()
    options = {"rank": {"3" if method == "tucker2" else "8": rank}, "allow_expansion": True}
    moments = tdecomp.calibrate(model, images(), **QUIET)
    fitted = tdecomp.calibrate(model, whole(images()), **QUIET)
    plans = [tdecomp.plan(model, method, data=m, **options, **QUIET) for m in (moments, fitted)]
    (row,) = (row for row in plans[0] if row.method)
    real = tdecomp.apply(model, plans[0], data=moments, **QUIET).report[row.name].output_error
    assert row.expected_error == pytest.approx(real, rel=1e-4 if method == "svd" else 0.1)
    assert row.expected_error != pytest.approx(plans[1][row.name].expected_error, rel=1e-3)


def test_of_a_fit_that_tells_an_error_the_error_is_kept():
    fits = []

    class Plain(tdecomp.SVD):
        name = "plain"

        def fit_to(self, kernel, rank, moment):
            fits.append(rank)
            return super().fit_to(kernel, rank, moment)

    model, method = mlp(), Plain()
    losses = losses_of(model, "2", tdecomp.calibrate(model, vectors(), **QUIET))
    with Recorded() as seen:
        error = losses.expected_error(method, 3)
    assert len(seen.decomposed) == 1  # of the fit itself
    assert losses.expected_error(method, 3) == error
    assert losses.known_fit(method, 3, draft=False) is None
    assert fits == [3]
    fit = losses.fit(method, 3, draft=False)
    assert losses.expected_error(method, 3) == error
    assert fit.held_out_error(losses.weight, losses.moments).value == error
