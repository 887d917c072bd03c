"""One SVD for each part of a fused Linear: the oracle, its ranks, and when a budget takes it."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import LayerSpec, SplitSVD
from tdecomp.decomposers.fit_layer import factorize, spectra_of
from tdecomp.decomposers.svd import SVD
from tdecomp.layers.split_linear import SplitLinear, SplitStage
from tdecomp.recovery.weights import Weights
from tests.decomposers.oracle import MOMENT_KINDS, ExactMethodCase, distance
from tests.geometries import Geometry, geometries

QUIET = {"progress": False}


@dataclass(frozen=True)
class FusedGeometry(Geometry):
    """A Linear of which it is known that it is several."""

    parts: tuple[int, ...] = ()

    @property
    def spec(self):
        return replace(LayerSpec.of(self.layer()), parts=self.parts)


def fused(into, *parts, **options):
    return FusedGeometry(nn.Linear, (into, sum(parts)), options=options, parts=parts)


FUSED = (
    fused(5, 5, 5, 5),
    fused(7, 4, 3, bias=False),
    fused(6, 6, 2, 2),
    fused(3, 5, 1, 4),
    fused(1, 2, 2),
)


def halved(geometry):
    into, out = geometry.channels
    return fused(into, out, out, **geometry.options)


class TestSplitSVD(ExactMethodCase):
    decomposer = SplitSVD()
    drawn = geometries(ndims=(0,)).map(halved)
    dense = LayerSpec(10, 24, parts=(8, 6, 10))
    stage_types = (nn.Linear, SplitLinear)

    def takes(self, spec):
        return bool(spec.parts)

    def taken(self):
        return FUSED

    def ranks(self, spec):
        largest = self.decomposer.max_rank(spec)
        mixed = tuple(max(1, most // (i + 2)) for i, most in enumerate(largest))
        return sorted({(1,) * len(largest), mixed, largest})

    def wrong_ranks(self, largest):
        *first, last = largest
        wrong = [(*first, 0), (*first, -1), (*first, last + 1), (*first, 1.0), (*first, True)]
        return [*wrong, 1, (*largest, 1), tuple(first), ()]

    # Layers without groups only.

    def test_groups_are_fitted_one_by_one(self):
        with pytest.raises(ValueError, match="parts"):
            replace(self.dense, in_channels=20, out_channels=48, groups=2)

    test_groups_are_fitted_to_their_own_data = test_groups_are_fitted_one_by_one

    # -- its own --------------------------------------------------------------------------------

    def test_each_part_is_an_svd_of_its_own(self):
        weight, moment = self.weight(self.dense), self.moment(self.dense)
        ranks = (3, 2, 5)
        for moments in (None, [moment]):
            both = factorize(SplitSVD(), weight, self.dense, ranks, moments).to_kernel()
            alone = [
                factorize(SVD(), part, LayerSpec(10, len(part)), rank, moments).to_kernel()
                for part, rank in zip(weight.split([8, 6, 10]), ranks, strict=True)
            ]
            # The scale that is taken out first, the largest entry, differs.
            assert distance(both, torch.cat(alone)) < 1e-10

    def test_spectra_are_those_of_the_parts(self):
        weight = self.weight(self.dense)
        spectra = spectra_of(SplitSVD(), weight, self.dense)
        scale = weight[:8].abs().max() ** 2
        for spectrum, part in zip(spectra, weight.split([8, 6, 10]), strict=True):
            squares = torch.from_numpy(spectrum.squares[0]) * scale
            torch.testing.assert_close(squares, torch.linalg.svdvals(part) ** 2)

    def losses(self, kind, weighted):
        """The best ranks, and the matrices that their losses are measured by."""
        weight, out = self.weight(self.dense), self.dense.out_channels
        moment = None if kind is None else self.moment(self.dense, kind)
        root = self.weight(LayerSpec(out, out), seed=7)
        importance = root @ root.T if weighted else None
        method = self.decomposer.for_layer(self.dense)
        best = method.best_ranks(weight, moment, importance, (1, 1, 1))
        seen = torch.eye(self.dense.fan_in).double()
        if moment is not None:
            seen = moment.matrix if moment.matrix is not None else moment.rows.T @ moment.rows

        def lost(rank, counts):
            fitted = factorize(self.decomposer, weight, self.dense, rank, moment and [moment])
            gone = weight - fitted.to_kernel()
            return (counts @ gone @ seen @ gone.T).trace().item()

        return best, lost, importance

    @pytest.mark.parametrize("kind", [None, *MOMENT_KINDS])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_losses_of_the_best_ranks_are_those_of_the_fits(self, kind, weighted):
        best, lost, importance = self.losses(kind, weighted)
        alike = torch.eye(self.dense.out_channels).double()
        whole = best.lost((0, 0, 0))
        assert best.ranks[0] == (1, 1, 1)
        assert best.ranks[-1] == self.decomposer.max_rank(self.dense)
        for i, rank in enumerate(best.ranks):
            assert best.lost(rank) == pytest.approx(lost(rank, alike), rel=1e-6, abs=1e-8 * whole)
            if weighted:
                expected = lost(rank, importance)
                most = best.weighted[0].item()
                assert best.weighted[i].item() == pytest.approx(expected, rel=1e-6, abs=1e-8 * most)
        assert (best.weighted is None) == (not weighted)

    @pytest.mark.parametrize("kind", [None, "full"])
    def test_no_other_ranks_that_cost_as_much_lose_less(self, kind):
        best, _, _ = self.losses(kind, weighted=False)
        largest = self.decomposer.max_rank(self.dense)
        prices = [10 + size for size in self.dense.parts]
        every = [*itertools.product(*(range(1, most + 1) for most in largest))]

        def cost(rank):
            return sum(price * r for price, r in zip(prices, rank, strict=True))

        for rank in best.ranks:
            others = [best.lost(other) for other in every if cost(other) <= cost(rank)]
            assert best.lost(rank) <= min(others) * (1 + 1e-9) + 1e-12
        for before, rank in itertools.pairwise(best.ranks):
            assert sum(rank) == sum(before) + 1

    def test_steps_are_kept(self):
        method = self.decomposer.for_layer(self.dense)
        best = method.best_ranks(self.weight(self.dense), None, None, (4, 2, 3))
        assert best.ranks[0] == (4, 2, 3)
        assert best.ranks[-1] == (8, 6, 9)
        assert len(best.ranks) == 1 + 1 + 2 + 2
        assert all(r % s == 0 for rank in best.ranks for r, s in zip(rank, (4, 2, 3), strict=True))


# What the parts are ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1, 0, -3, True, 2.0, (), (4,), (4, 0), (4, 2.0), [4, 4], "qkv"])
def test_parts_are_several(wrong):
    with pytest.raises(ValueError, match="split-svd: expected parts"):
        SplitSVD(parts=wrong)


def test_parts_that_the_user_states_come_before_those_of_the_name():
    spec = LayerSpec(8, 24, parts=(8, 8, 8))
    assert SplitSVD().max_rank(spec) == (8, 8, 8)
    assert SplitSVD(parts=2).max_rank(spec) == (8, 8)
    assert SplitSVD(parts=(20, 4)).max_rank(spec) == (8, 4)


@pytest.mark.parametrize(
    "method, layer, words",
    [
        (SplitSVD(), nn.Linear(8, 24), "split-svd takes Linear layers that are several in one"),
        (SplitSVD(parts=5), nn.Linear(8, 24), "parts=5 takes .* outputs are a multiple of 5"),
        (SplitSVD(parts=(8, 8)), nn.Linear(8, 24), r"parts=\(8, 8\) takes .* outputs are 16"),
        (SplitSVD(parts=2), nn.Conv2d(8, 24, 1), "takes Linear layers"),
    ],
)
def test_refusals_say_what_it_takes(method, layer, words):
    with pytest.raises(ValueError, match=words):
        tdecomp.draw(layer, method, 2)


def test_parts_of_a_layer_by_any_name():
    layer = nn.Linear(8, 24)
    result = tdecomp.decompose(layer, SplitSVD(parts=3), rank=(1, 2, 3), **QUIET)
    assert result.report[""].rank == (1, 2, 3)
    assert type(result.model[1]) is SplitLinear
    plan = tdecomp.Plan.from_json(result.plan.to_json())
    assert plan.decomposers["split-svd"] == SplitSVD(parts=3)
    x = torch.randn(2, 8)
    again = tdecomp.apply(layer, plan, **QUIET).model
    torch.testing.assert_close(again(x), result.model(x))


# In a model --------------------------------------------------------------------------------------

WIDTH = 32


class Attention(nn.Module):
    """A fused layer, and one behind it."""

    def __init__(self, kind):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.qkv.weight.copy_(WEIGHTS[kind]())

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Fused(nn.Module):
    """The fused layer alone, whose outputs count alike."""

    def __init__(self, kind):
        super().__init__()
        self.qkv = Attention(kind).qkv

    def forward(self, x):
        return self.qkv(x)


def gaussian(rows, columns):
    return torch.randn(rows, columns) / columns**0.5


def own_ranks():
    """Queries and keys of rank 3 and 5; the values have all."""
    low = [gaussian(WIDTH, r) @ gaussian(r, WIDTH) for r in (3, 5)]
    return torch.cat([*low, gaussian(WIDTH, WIDTH)])


def one_row_space():
    """All three read the same 6 directions of the inputs."""
    return gaussian(3 * WIDTH, 6) @ gaussian(6, WIDTH) * 3 + 0.01 * gaussian(3 * WIDTH, WIDTH)


def nothing_planted():
    return gaussian(3 * WIDTH, WIDTH)


def values_of_rank_two():
    """What is left over of a budget is wasted on them."""
    low = gaussian(WIDTH, 2) @ gaussian(2, WIDTH)
    return torch.cat([gaussian(2 * WIDTH, WIDTH), low])


KINDS = (own_ranks, one_row_space, nothing_planted, values_of_rank_two)
WEIGHTS = {f.__name__: f for f in KINDS}


def model(kind, seed=0, block=Attention):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(block(kind)).eval()


@pytest.fixture
def x():
    return torch.randn(64, 6, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("methods", ["auto", "dense"])
@pytest.mark.parametrize("by_data", [False, True])
def test_a_budget_takes_it_where_the_parts_have_ranks_of_their_own(methods, by_data, x):
    options = {"example_inputs": x[:1], "data": [x] if by_data else None, **QUIET}
    plan = tdecomp.plan(model("own_ranks"), methods, rank=tdecomp.Budget(macs=0.6), **options)
    row = plan["0.qkv"]
    assert row.method == "split-svd"
    assert row.rank[0] <= 3
    assert row.rank[1] <= 5
    assert row.rank[2] > 5


@pytest.mark.parametrize("by_data", [False, True])
def test_a_budget_keeps_one_svd_where_the_parts_read_the_same(by_data, x):
    options = {"example_inputs": x[:1], "data": [x] if by_data else None, **QUIET}
    net = model("one_row_space", block=Fused)
    plan = tdecomp.plan(net, "auto", rank=tdecomp.Budget(macs=0.6), **options)
    assert plan["0.qkv"].method == "svd"


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("by_data", [False, True])
def test_of_all_ranks_of_both_methods_that_fit_none_loses_less(kind, share, by_data, x):
    net = model(kind, block=Fused)
    data = tdecomp.calibrate(net, [x], gradients=False, **QUIET) if by_data else None
    weight = net[0].qkv.weight.detach().double()
    limit = share * weight.numel()
    parts = weight.split(WIDTH)
    if by_data:
        (moment,) = data["0.qkv"].second_moments()
        losses = [SVD().lost_at_every_rank(part, moment) for part in (weight, *parts)]
    else:
        losses = [SVD().lost_at_every_rank(part, None) for part in (weight, *parts)]
    shared, *alone = [lost.tolist() for lost in losses]
    least = min(shared[r] for r in range(WIDTH + 1) if r * 4 * WIDTH <= limit)
    for ranks in itertools.product(range(1, WIDTH + 1), repeat=3):
        if sum(ranks) * 2 * WIDTH <= limit:
            least = min(least, sum(lost[r] for lost, r in zip(alone, ranks, strict=True)))
    options = {"example_inputs": x[:1], "data": data, **QUIET}
    plan = tdecomp.plan(net, ["svd", "split-svd"], rank=tdecomp.Budget(macs=share), **options)
    row = plan["0.qkv"]
    if row.method == "svd":
        found = shared[row.rank]
    else:
        found = sum(lost[r] for lost, r in zip(alone, row.rank, strict=True))
    # Of each method 48 ranks are compared, and what is left over is spent on the better one's.
    assert found <= least * 1.001 + 1e-9 * shared[0]


def test_selectors_of_one_layer(x):
    """Ints and pairs spread, ratios and shares take the ranks that lose least together."""
    net = model("own_ranks")

    def rank(selector, **options):
        given = {"example_inputs": x[:1], "allow_expansion": True, **QUIET, **options}
        return tdecomp.plan(net, "split-svd", rank=selector, include="0.qkv", **given)["0.qkv"].rank

    assert rank(4) == (4, 4, 4)
    assert rank((2, 3, 4)) == (2, 3, 4)
    assert rank({"0.qkv": (2, 3, 4)}) == (2, 3, 4)
    assert rank(0.25) == (8, 8, 8)
    assert rank(tdecomp.Ratio(0.25, of="macs"))[:2] <= (3, 5)
    assert sum(rank(tdecomp.Ratio(0.25, of="macs"))) == 12
    assert rank(tdecomp.Energy(1.0 - 1e-9))[:2] == (3, 5)
    assert rank(tdecomp.VBMF())[2] == 1  # of noise
    variance = rank(tdecomp.OutputVariance(0.9), data=[x])
    assert variance[0] <= 3
    assert sum(variance) < sum(rank(tdecomp.OutputVariance(0.99), data=[x]))
    assert rank("breakeven")[2] == WIDTH  # before what is round-off only


def test_output_variance_takes_the_smallest_ranks_that_keep_the_share(x):
    net = model("own_ranks")
    options = {"include": "0.qkv", "data": [x], "allow_expansion": True, **QUIET}
    row = tdecomp.plan(net, "split-svd", rank=tdecomp.OutputVariance(0.9), **options)["0.qkv"]
    assert row.expected_error < 0.11  # of samples that are held out
    for i in range(3):
        smaller = tuple(r - (i == j) for j, r in enumerate(row.rank))
        lost = tdecomp.plan(net, "split-svd", rank={"0.qkv": smaller}, **options)["0.qkv"]
        assert lost.expected_error > 0.09


@pytest.mark.parametrize("rank", [(2, 3, 20), tdecomp.Ratio(0.4, of="macs")])
@pytest.mark.parametrize("by_data", [False, True])
def test_a_plan_knows_the_error_of_the_result(rank, by_data, x):
    net = model("own_ranks")
    options = {
        "include": "0.qkv",
        "example_inputs": x[:1],
        "data": [x] if by_data else None,
        **QUIET,
    }
    plan = tdecomp.plan(net, "split-svd", rank=rank, **options)
    row = tdecomp.apply(net, plan, data=options["data"], **QUIET).report["0.qkv"]
    error = row.output_error if by_data else row.weight_error
    assert plan["0.qkv"].expected_error == pytest.approx(error, rel=1e-4)


def test_saved_loaded_and_reduced(x, tmp_path):
    net = model("own_ranks")
    result = tdecomp.decompose(net, "split-svd", rank=(4, 6, 20), include="0.qkv", **QUIET)
    result.save(tmp_path / "small.safetensors")
    loaded = tdecomp.load(tmp_path / "small.safetensors", model("nothing_planted", seed=1))
    assert torch.equal(loaded(x), result.model(x))
    assert loaded[0].qkv.rank == (4, 6, 20)
    for rank in (2, (2, 6, 10), 0.5, tdecomp.Ratio(0.5, of="params"), tdecomp.Budget(params=0.9)):
        less = tdecomp.reduce_ranks(result, rank=rank, **QUIET)
        reduced = less.model[0].qkv.rank
        assert reduced < (4, 6, 20)
        assert all(now <= before for now, before in zip(reduced, (4, 6, 20), strict=True))
        less.model(x).sum().backward()
    whole = tdecomp.reduce_ranks(result, rank=tdecomp.Ratio(1.0, of="params"), **QUIET)
    assert whole.model[0].qkv.rank == (4, 6, 20)
    with pytest.raises(ValueError, match="above its current one"):
        tdecomp.reduce_ranks(result, rank=(4, 7, 20), **QUIET)


def test_recovered(x):
    """Refitting takes the gradients at the outputs into account, part by part."""
    net = model("own_ranks")
    noise = torch.randn(512, 6, WIDTH, generator=torch.Generator().manual_seed(2))
    data = [*(noise * torch.linspace(0.2, 2.0, WIDTH)).split(64)]
    result = tdecomp.decompose(net, "split-svd", rank=(2, 3, 6), include="0.qkv", **QUIET)
    recovery = tdecomp.refit(result.model, net, data, augment=None, **QUIET)
    assert recovery.error_after < 0.9 * recovery.error_before
    assert type(recovery.model[0].qkv[1]) is SplitLinear
    for step in (tdecomp.reconstruct, tdecomp.distill):
        options = {"augment": None, "steps": 20} if step is tdecomp.distill else {"augment": None}
        recovery = step(result.model, net, data, **options, **QUIET)
        assert recovery.error_after <= recovery.error_before
    del x


def test_refitting_mixes_outputs_within_a_part_only():
    spec, generator = LayerSpec(10, 24, parts=(8, 6, 10)), torch.Generator().manual_seed(0)
    weight = torch.randn(24, 10, generator=generator).double()
    root = torch.randn(24, 24, generator=generator).double()
    weights = Weights(spec, root @ root.T, 100, SplitSVD().output_blocks(spec))
    factors = factorize(SplitSVD(), weight, spec, (3, 2, 5))
    mixed = weights.of_factors(factors, SplitSVD())
    (whole,) = weights.of([factors.to_kernel()])
    assert distance(mixed.to_kernel(), whole) < 1e-12
    stage = SplitSVD().stages(spec, (3, 2, 5))[-1]
    module = stage.build(dtype=torch.float64)
    stage.put(module, mixed.stage_weights()[-1])
    assert torch.equal(stage.read(module), mixed.stage_weights()[-1])  # no other entries
    assert distance(weights.undone(mixed, SplitSVD()).to_kernel(), factors.to_kernel()) < 1e-12


def test_a_chain_that_does_not_pay_says_exactly_what_one_that_does_would_lose(x):
    net = model("own_ranks", block=Fused)
    plan = tdecomp.plan(net, "split-svd", rank=WIDTH, example_inputs=x, **QUIET)
    best = tdecomp.plan(net, "split-svd", rank="breakeven", example_inputs=x, **QUIET)["0.qkv"]
    words = f"(split-svd {best.rank}) would have the relative error {best.expected_error:.3f}"
    assert words in plan["0.qkv"].reason


def test_timed(x):
    net = model("own_ranks")
    times = tdecomp.profile(net, x, ["svd", "split-svd"], effort="quick", **QUIET)
    timed = [s for _, stages, _ in times.times for s in stages if isinstance(s, str)]
    assert timed
    options = {"example_inputs": x, "profile": times, **QUIET}
    plan = tdecomp.plan(net, "split-svd", rank=2, include="0.qkv", **options)
    assert plan["0.qkv"].latency_after is not None


def test_equal_layers_of_other_parts_are_timed_as_well():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.other = nn.Linear(24, 72), nn.Linear(24, 72)

        def forward(self, x):
            return self.qkv(x) + self.other(x)

    times = tdecomp.profile(Two(), torch.zeros(2, 24), "split-svd", effort="quick", **QUIET)
    assert any(isinstance(s, str) for _, stages, _ in times.times for s in stages)


def test_a_stage_in_words_and_as_plain_data():
    stage = SplitStage((2, 3), (8, 4), bias=False)
    assert str(stage) == "SplitLinear(2→8, 3→4, no bias)"
    assert stage.to_dict() == {"into": (2, 3), "out": (8, 4), "bias": False}
    assert (stage.in_channels, stage.params) == (5, 28)
    assert replace(stage, bias=True).params == 28 + 12
    drawing = str(tdecomp.draw(nn.Linear(8, 12), SplitSVD(parts=(8, 4)), (2, 3)))
    assert ">SplitLinear<" in drawing
    assert ">2→8, 3→4<" in drawing
    assert math.prod(stage.output_size(())) == 1


def test_under_autocast_it_gives_what_a_linear_gives():
    layer, x = nn.Linear(8, 24), torch.randn(3, 8)
    chain = tdecomp.decompose(layer, SplitSVD(parts=3), rank=2, **QUIET).model
    with torch.autocast("cpu", torch.bfloat16):
        assert chain(x).dtype == layer(x).dtype == torch.bfloat16
    chain.half()(x.half()).sum().backward()


def test_building_one_draws_no_random_numbers():
    before = torch.get_rng_state()
    SplitStage((2, 3), (8, 4), bias=True).build()
    assert torch.equal(before, torch.get_rng_state())


def test_other_layers_are_not_looked_at_for_it():
    net = nn.Sequential(nn.Linear(16, 48), nn.Conv2d(4, 6, 3))
    table = tdecomp.sensitivity(net, "auto", **QUIET)
    assert all("split-svd" not in layer for layer in table.values())
