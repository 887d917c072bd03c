"""What is timed, what is read between the times, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.example import Example
from tdecomp.timing.profile import timed_ranks
from tdecomp.timing.stopwatch import THIS_MACHINE
from tests.unchanged import unchanged

QUICK = {"progress": False, "effort": "quick"}


def test_equal_layers_are_timed_once(stopwatch, profiled, model, x):
    times = profiled(model, x)
    assert len(stopwatch.layers_timed) == len(set(stopwatch.layers_timed))
    layers = {key for key in times.times if len(key[1]) == 1}
    # Two of the four layers are equal.
    assert {str(stages[0]) for _, stages, _ in layers} == {
        str(LayerSpec.of(model[i])) for i in (0, 2, 7)
    }


def test_every_method_at_few_ranks(profiled, model, x):
    times = profiled(model, x, methods=["lowrank", "svd"])
    spec, call = LayerSpec.of(model[2]), Call(2, (12, 12))
    decomposer = get_decomposer("lowrank")
    ranks = timed_ranks(decomposer, spec, call, times.rounding, times.points)
    assert 2 <= len(ranks) <= times.points
    for rank in ranks:
        assert ("contiguous", tuple(decomposer.stages(spec, rank)), call) in times.times


def test_real_times(model, x):
    with unchanged(model):
        times = tdecomp.profile(model, x, "lowrank", **QUICK)
    assert all(0 < time.low <= time.median <= time.high for time in times.times.values())
    assert 0 < times.whole["contiguous"].median < 5
    assert "Conv2d(64→64" in str(times)
    assert "float32 tensor of shape (2, 3, 12, 12)" in times.summary()


def test_the_spread_is_that_of_the_typical_time(stopwatch, profiled, model, x):
    assert profiled(model, x, "lowrank").spread == 0
    stopwatch.chain_scatter = 0.1
    # Of seven rounds from -2 to 2 the quartiles are at -1 and 1; the layers do not scatter.
    times = profiled(model, x, "lowrank")
    assert times.spread == pytest.approx(0.2)
    assert "times scatter by 20%" in times.summary()


def test_in_both_layouts(model, x):
    times = tdecomp.profile(model, x, "lowrank", memory_format="auto", **QUICK)
    assert times.layouts == ("contiguous", "channels_last")
    assert times.best_layout in times.layouts
    assert {layout for layout, _, _ in times.times} == set(times.layouts)


@pytest.mark.parametrize("wanted", ["channels_last", torch.channels_last])
def test_in_a_layout_by_name_or_format(x, wanted):
    conv = nn.Conv2d(3, 4, 3)
    times = tdecomp.profile(conv, x, "lowrank", memory_format=wanted, **QUICK)
    assert times.layouts == ("channels_last",)


def test_the_layout_of_the_model_by_default(profiled, model, x):
    model = model.to(memory_format=torch.channels_last)
    assert profiled(model, x).layouts == ("channels_last",)


class TwoParts(nn.Module):
    """Its own `forward` fails; one part can be called."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 64), nn.Linear(64, 64)


def test_forward_says_how_the_model_is_called():
    model, x = TwoParts(), [torch.zeros(3, 64)]

    def encode(model, inputs):
        return model.encoder(inputs[0])

    times = tdecomp.profile(model, x, "svd", forward=encode, **QUICK)
    assert {call.batch for _, _, call in times.times} == {3}
    assert times.whole["contiguous"].median > 0
    plan = tdecomp.plan(
        model, "svd", rank=8, example_inputs=x, forward=encode, profile=times, progress=False
    )
    assert plan["encoder"].macs_before == 3 * 64 * 64
    assert plan["decoder"].macs_before == 0
    with pytest.raises(ValueError, match=r"inputs .*called by forward, now"):
        times.check(model, Example(x))


def test_times_of_timed_ranks_and_between_them(stopwatch, profiled, model, x):
    times = profiled(model, x, methods="lowrank")
    decomposer, spec, call = get_decomposer("lowrank"), LayerSpec.of(model[2]), Call(2, (12, 12))
    ranks = timed_ranks(decomposer, spec, call, times.rounding, times.points)

    def of(rank):
        return times.chain(decomposer, spec, rank, (call,), "contiguous")

    def law(rank):
        return stopwatch.chain(decomposer.stages(spec, rank), call)

    for rank in (*ranks, (ranks[0] + ranks[1]) // 2, ranks[-1] - 1):
        assert of(rank) == pytest.approx(law(rank), rel=1e-6)
    # Twice called, twice as long.
    twice = times.chain(decomposer, spec, ranks[0], (call, call), "contiguous")
    assert twice == pytest.approx(2 * law(ranks[0]))
    # A block that is half empty takes as long as a full one.
    assert of(1) == pytest.approx(law(ranks[0]))


def test_a_layer_that_was_not_timed(profiled, model, x):
    times = profiled(model, x)
    with pytest.raises(ValueError, match=r"no time of Linear\(7→7.*cache=profile"):
        times.layer(LayerSpec(7, 7), (Call(1),), "contiguous")


@pytest.mark.parametrize(
    "law, multiple",
    [
        (lambda stages, _: 1e-6 * -(-stages[0].out_channels // 16), 16),  # blocks of 16
        (lambda stages, _: 1e-6 * stages[0].out_channels, 8),  # in proportion
    ],
)
def test_the_multiple_that_the_machine_prefers(stopwatch, profiled, law, multiple):
    stopwatch.law = law
    assert profiled(nn.Conv2d(256, 256, 3), torch.zeros(1, 256, 8, 8)).round_to == multiple


def test_saved_and_loaded(profiled, model, x, tmp_path):
    times = profiled(model, x, layouts=("contiguous", "channels_last"))
    times.save(tmp_path / "times.json")
    loaded = tdecomp.Profile.load(tmp_path / "times.json")
    assert loaded == times
    assert loaded.stopwatch is THIS_MACHINE


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "setting": 3}'])
def test_no_profile(tmp_path, text):
    file = tmp_path / "times.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"times\.json: .*(not JSON|expected|reads format 1)"):
        tdecomp.Profile.load(file)


def test_a_cache_is_not_measured_again(stopwatch, profiled, model, x):
    first = profiled(model, x, "lowrank")
    stopwatch.layers_timed.clear()
    second = profiled(model, x, "lowrank", cache=first)
    assert stopwatch.layers_timed == []
    assert second.times == first.times
    profiled(model, x, ["lowrank", "spatial"], cache=first)
    assert stopwatch.layers_timed
    assert not set(stopwatch.layers_timed) & set(first.times)


def test_a_cache_of_another_machine(x):
    conv = nn.Conv2d(3, 4, 3)
    first = tdecomp.profile(conv, x, "lowrank", **QUICK)
    other = replace(first, setting=replace(first.setting, machine="another"))
    with pytest.raises(ValueError, match=r"machine 'another'.*on_mismatch='remeasure'"):
        tdecomp.profile(conv, x, "lowrank", cache=other, **QUICK)
    again = tdecomp.profile(conv, x, "lowrank", cache=other, on_mismatch="remeasure", **QUICK)
    assert again.setting == first.setting
    assert again.times.keys() == first.times.keys()
    assert again.times != first.times


class TestRefused:
    def test_no_inputs(self, model):
        for inputs in ((), (None,)):
            with pytest.raises(ValueError, match=r"got no example_inputs"):
                tdecomp.profile(model, *inputs)

    def test_a_cache_that_is_a_path(self, model, x):
        with pytest.raises(TypeError, match=r"cache: expected a Profile, got 'p\.json'.*load"):
            tdecomp.profile(model, x, cache="p.json")

    def test_inputs_that_the_model_rejects(self, model):
        with pytest.raises(ValueError, match=r"rejected example_inputs"):
            tdecomp.profile(model, torch.zeros(1, 5, 12, 12))

    @pytest.mark.parametrize(
        "option, words",
        [
            ({"effort": "heroic"}, "effort to be one of"),
            ({"memory_format": "sideways"}, "memory_format to be 'auto'"),
            ({"on_mismatch": "ignore"}, "on_mismatch to be one of"),
        ],
    )
    def test_options(self, model, x, option, words):
        with pytest.raises(ValueError, match=words):
            tdecomp.profile(model, x, **option)

    @pytest.mark.parametrize(
        "change, words",
        [
            (lambda m, x: (m, x[:1]), r"inputs .*\(2, 3, 12, 12\), now .*\(1, 3, 12, 12\)"),
            (lambda m, x: (m.double(), x.double()), r"dtype 'float32', now 'float64'"),
            (lambda m, x: (m[:6], x), r"model Sequential with .* now Sequential with"),
        ],
    )
    def test_a_profile_of_something_else(self, profiled, model, x, change, words):
        times = profiled(model, x)
        other, inputs = change(model, x)
        with pytest.raises(ValueError, match=words):
            tdecomp.plan(
                other,
                "lowrank",
                rank=tdecomp.Budget(latency=0.5),
                example_inputs=inputs,
                profile=times,
                progress=False,
            )


@pytest.mark.parametrize("change", [{"round_to": 0}, {"points": 0}, {"whole": {}}], ids=str)
def test_a_profile_that_cannot_be(profiled, model, x, change):
    times = profiled(model, x, "lowrank")
    with pytest.raises(ValueError, match="expected times in layouts"):
        replace(times, **change)
