"""`compress_to`, on small models."""

import json
import re

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.registry import listed_methods
from tdecomp.model.example import Example
from tdecomp.model.sites import find_sites
from tdecomp.timing.measure import measure
from tests.timing.fake_stopwatch import FakeStopwatch
from tests.unchanged import all_unchanged, unchanged

QUIET = {"progress": False}
X = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))


def net():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8)
        )


def closeness(original):
    wanted = original(X).detach()
    return lambda model: -((model(X) - wanted).square().mean() / wanted.var()).item()


def params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("of", ["macs", "params"])
def test_the_result_keeps_the_quality_at_the_share_it_says(of):
    model = net()
    metric = closeness(model)
    with all_unchanged(model):
        result = tdecomp.compress_to(
            model, tdecomp.Quality(metric, drop=0.2), "svd", data=[X], of=of, **QUIET
        )
    assert metric(result.model) == result.chosen.verdict.value >= -0.2
    assert params(result.model) == result.report.after.params
    assert result.share == getattr(result.report.after, of) / getattr(result.report.before, of)
    assert 0.3 < result.share < 0.95
    refused = [t.reached for t in result.trials if not t.verdict.kept]
    assert max(refused) < result.share  # the largest that was refused is close to it
    assert result.evaluations <= 10
    assert result.report.recovery[0].step == "refit"
    assert result.report.speed.measured is not None


def test_at_least_is_another_way_to_say_it():
    model = net()
    shares = {
        tdecomp.compress_to(
            model, tdecomp.Quality(closeness(model), **limit), "svd", data=[X], **QUIET
        ).share
        for limit in ({"drop": 0.2}, {"at_least": -0.2})
    }
    assert len(shares) == 1


def test_the_metric_sees_copies_in_evaluation_mode():
    model = net().train()
    seen = []

    def spoiling(given):
        seen.append(given.training)
        nn.init.zeros_(given[4].bias)
        return 1.0

    with unchanged(model):
        result = tdecomp.compress_to(
            model, tdecomp.Quality(spoiling, drop=0), "svd", data=[X], recover=(), **QUIET
        )
    assert set(seen) == {False}
    assert result.model.training
    assert bool(result.model[4][-1].bias.any())


def test_a_quality_that_never_falls_gives_the_least_share():
    result = tdecomp.compress_to(
        net(), tdecomp.Quality(lambda _: 1.0, drop=0), "svd", data=[X], recover=(), **QUIET
    )
    assert all(row.rank == 1 for row in result.plan)
    assert "1 at" in result.summary()


def test_no_evaluation_is_spent_on_the_same_model_twice():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    sizes = []
    quality = tdecomp.Quality(lambda m: float(sizes.append(params(m)) or params(m) > 100), drop=0.5)
    result = tdecomp.compress_to(model, quality, "svd", data=[X[:, :8]], recover=(), **QUIET)
    assert len({*sizes[2:]}) == len(result.trials)
    assert len(sizes) == result.evaluations < 10


def test_where_nothing_will_do_the_original_comes_back_in_words():
    model = net()
    small = tdecomp.Quality(lambda m: float(params(m) == params(model)), drop=0.5)
    result = tdecomp.compress_to(model, small, "svd", data=[X], recover=(), **QUIET)
    assert result.chosen is None
    assert result.share == 1
    assert torch.equal(result.model(X), model(X))
    assert result.model is not model
    assert {row.method for row in result.report} == {None}
    assert "no smaller model keeps the quality (asked for at least 0.5" in result.summary()
    assert result.evaluations <= 10


def test_where_nothing_can_be_made_smaller_it_says_so():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    x = torch.randn(2, 4, 8, 8)
    quality = tdecomp.Quality(lambda _: 1.0, drop=0.5)
    result = tdecomp.compress_to(model, quality, "dense", data=[x], recover=(), **QUIET)
    assert result.trials == ()
    assert "no smaller model can be made" in str(result)
    assert torch.equal(result.model(x), model(x))
    result.plot()


def test_a_metric_that_is_higher_for_smaller_models_is_remarked_on():
    result = tdecomp.compress_to(
        net(), tdecomp.Quality(lambda m: -params(m), drop=1), "svd", data=[X], recover=(), **QUIET
    )
    assert result.share < 0.2
    assert re.search(r"above the original's at .*: is higher better in this metric\?", str(result))


def test_a_noisy_metric_says_how_noisy_it_is():
    model = net()
    quiet, draw = closeness(model), torch.Generator().manual_seed(0)

    def noisy(given):
        return quiet(given) + 0.2 * float(torch.randn((), generator=draw))

    result = tdecomp.compress_to(model, tdecomp.Quality(noisy, drop=0.2), "svd", data=[X], **QUIET)
    assert "margin" in str(result)
    assert "the metric scatters by ±" in result.summary()


def test_shares_of_time():
    model, stopwatch = net(), FakeStopwatch()
    stopwatch.per_layer = 0.0
    sites = list(find_sites(model, None, Example(X)).values())
    times = measure(model, Example(X), sites, listed_methods("svd"), stopwatch=stopwatch)
    result = tdecomp.compress_to(
        model, tdecomp.Quality(closeness(model), drop=0.3), "svd", data=[X], of="latency",
        example_inputs=X, profile=times, **QUIET,
    )  # fmt: skip
    before, after = (stopwatch.whole(m, Example(X)) for m in (model, result.model))
    assert result.share == result.report.speed.measured.median == pytest.approx(after / before)
    assert result.share < 0.95
    assert "of the time" in str(result)


def test_moments_will_do_without_recovery():
    model = net()
    moments = tdecomp.calibrate(model, [X], **QUIET)
    options = {"data": moments, "recover": (), **QUIET}
    quality = tdecomp.Quality(closeness(model), drop=0.3)
    result = tdecomp.compress_to(model, quality, "svd", example_inputs=X[:1], **options)
    assert result.share < 1
    with pytest.raises(ValueError, match="got neither example_inputs nor batches"):
        tdecomp.compress_to(model, quality, "svd", **options)


def test_what_is_tried_can_be_looked_at(tmp_path):
    model = net()
    result = tdecomp.compress_to(
        model, tdecomp.Quality(closeness(model), drop=0.2), "svd", data=[X], **QUIET
    )
    lines = str(result).splitlines()
    assert sum(" chosen " in line for line in lines) == 1
    assert len(lines) == 2 + 1 + len(result.trials) + 1
    reached = [trial.reached for trial in result.trials]
    assert reached == sorted(reached, reverse=True)
    plain = json.loads(json.dumps(result.to_dict()))
    assert [trial["kept"] for trial in plain["trials"]] == [t.verdict.kept for t in result.trials]
    assert result._repr_html_().count("<tr") == 2 + len(result.trials)
    figure = result.plot()
    (axes,) = figure.axes
    assert axes.get_xlabel() == "share of the MACs"
    assert result.plot(ax=axes) is figure
    result.save(tmp_path / "small.safetensors")
    again = tdecomp.load(tmp_path / "small.safetensors", model)
    assert torch.equal(again(X), result.model(X))


def test_what_it_will_cost_is_said(capsys):
    model = net()
    tdecomp.compress_to(model, tdecomp.Quality(lambda _: 1.0, drop=1), "svd", data=[X])
    said = capsys.readouterr().err
    assert re.search(r"compress_to: .* 0/8 evaluations \[.*the metric takes [\d.e-]+ s", said)
    assert re.search(r"1/8 evaluations \[\d\d:\d\d, \d\d:\d\d left", said)


def failing(at):
    """A metric that fails for models with fewer parameters."""

    def metric(model):
        if params(model) < at:
            raise RuntimeError("out of luck")
        return 1.0

    return metric


def test_a_metric_that_fails_is_named_with_the_share():
    model = net()
    for at, words in ((10**9, "the original model"), (params(model), r"the model at 0\.500 of")):
        quality = tdecomp.Quality(failing(at), drop=1)
        with (
            all_unchanged(model),
            pytest.raises(ValueError, match=f"failed on {words}.*RuntimeError: out of luck"),
        ):
            tdecomp.compress_to(model, quality, "svd", data=[X], **QUIET)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "net"}, "model: expected an nn.Module, got str"),
        ({"include": "5"}, "include: '5' matches no"),
        ({"quality": 0.5}, r"expected a Quality, such as .*, got 0\.5"),
        ({"of": "flops"}, r"expected of to be one of \['macs', .*, got 'flops'"),
        ({"data": None}, "refit runs the model on batches, got none"),
        ({"data": iter([X])}, "yields them only once"),
        ({"data": iter([X]), "recover": ()}, "without example_inputs goes through the batches"),
    ],
)
def test_bad_arguments(arguments, message):
    quality = tdecomp.Quality(lambda _: 1.0, drop=1)
    given = {"model": net(), "quality": quality, "data": [X], **QUIET, **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        tdecomp.compress_to(methods="svd", **given)
