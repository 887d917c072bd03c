"""What is timed, what is read between the times, and what is refused."""

import json

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.spec import Call, LayerSpec
from tdecomp.timing.layers import timed_ranks
from tests.unchanged import unchanged

QUIET = {"progress": False}


def profiled(model, x, **options):
    return tdecomp.profile(model, x, **{**QUIET, **options})


def test_equal_layers_are_timed_once(clock, model, x):
    times = profiled(model, x)
    assert len(clock.layers_timed) == len(set(clock.layers_timed))
    layers = {key for key in times.times if len(key[1]) == 1}
    # Two of the four layers are equal.
    assert {str(stages[0]) for _, stages, _ in layers} == {
        str(LayerSpec.of(model[i])) for i in (0, 2, 7)
    }


@pytest.mark.usefixtures("clock")
def test_every_method_at_few_ranks(model, x):
    times = profiled(model, x, methods=["lowrank", "svd"])
    spec, call = LayerSpec.of(model[2]), Call(2, (12, 12))
    decomposer = get_decomposer("lowrank")
    ranks = timed_ranks(decomposer, spec, call, times.rounding, times.points)
    assert 2 <= len(ranks) <= times.points
    for rank in ranks:
        assert ("contiguous", tuple(decomposer.stages(spec, rank)), call) in times.times


def test_real_times(model, x):
    with unchanged(model):
        times = profiled(model, x, methods="lowrank", effort="quick")
    assert all(time.median > 0 for time in times.times.values())
    assert 0 < times.whole["contiguous"].median < 5
    assert times.spread >= 0
    assert "Conv2d(64→64" in str(times)
    assert "float32 tensor of shape (2, 3, 12, 12)" in times.summary()


def test_in_both_layouts(model, x):
    times = profiled(model, x, methods="lowrank", effort="quick", memory_format="auto")
    assert times.layouts == ("contiguous", "channels_last")
    assert times.best_layout in times.layouts
    assert {layout for layout, _, _ in times.times} == set(times.layouts)


@pytest.mark.parametrize("wanted", ["channels_last", torch.channels_last])
@pytest.mark.usefixtures("clock")
def test_in_a_layout_by_name_or_format(model, x, wanted):
    assert profiled(model, x, memory_format=wanted).layouts == ("channels_last",)


@pytest.mark.usefixtures("clock")
def test_the_layout_of_the_model_by_default(model, x):
    model = model.to(memory_format=torch.channels_last)
    assert profiled(model, x).layouts == ("channels_last",)


def test_times_of_timed_ranks_and_between_them(clock, model, x):
    times = profiled(model, x, methods="lowrank")
    decomposer, spec, call = get_decomposer("lowrank"), LayerSpec.of(model[2]), Call(2, (12, 12))
    ranks = timed_ranks(decomposer, spec, call, times.rounding, times.points)

    def of(rank):
        return times.chain(decomposer, spec, rank, (call,), "contiguous")

    def law(rank):
        return clock.chain(decomposer.stages(spec, rank), call)

    for rank in (*ranks, (ranks[0] + ranks[1]) // 2, ranks[-1] - 1):
        assert of(rank) == pytest.approx(law(rank), rel=1e-6)
    # Twice called, twice as long.
    twice = times.chain(decomposer, spec, ranks[0], (call, call), "contiguous")
    assert twice == pytest.approx(2 * law(ranks[0]))
    # A block that is half empty takes as long as a full one.
    assert of(1) == pytest.approx(law(ranks[0]))


@pytest.mark.usefixtures("clock")
def test_a_layer_that_was_not_timed(model, x):
    times = profiled(model, x)
    with pytest.raises(ValueError, match=r"no time of Linear\(7→7.*cache=profile"):
        times.layer(LayerSpec(7, 7), (Call(1),), "contiguous")


def test_what_the_machine_likes(clock, monkeypatch):
    wide = nn.Conv2d(256, 256, 3)

    def blocks_of_16(stages, *_):
        return 1e-6 * -(-stages[0].out_channels // 16)

    def in_proportion(stages, *_):
        return 1e-6 * stages[0].out_channels

    monkeypatch.setattr(clock, "chain", blocks_of_16)
    assert profiled(wide, torch.zeros(1, 256, 8, 8)).round_to == 16
    monkeypatch.setattr(clock, "chain", in_proportion)  # no multiple is better than another
    assert profiled(wide, torch.zeros(1, 256, 8, 8)).round_to == 8


@pytest.mark.usefixtures("clock")
def test_saved_and_loaded(model, x, tmp_path):
    times = profiled(model, x, memory_format="auto")
    times.save(tmp_path / "times.json")
    assert tdecomp.Profile.load(tmp_path / "times.json") == times


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "setting": 3}'])
def test_no_profile(tmp_path, text):
    file = tmp_path / "times.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"is no profile|reads format 1"):
        tdecomp.Profile.load(file)


def test_a_cache_is_not_measured_again(clock, model, x):
    first = profiled(model, x, methods="lowrank")
    clock.layers_timed.clear()
    second = profiled(model, x, methods="lowrank", cache=first)
    assert clock.layers_timed == []
    assert second.times == first.times
    profiled(model, x, methods=["lowrank", "spatial"], cache=first)
    assert clock.layers_timed
    assert not set(clock.layers_timed) & set(first.times)


def test_a_cache_of_another_machine(clock, model, x, tmp_path):
    first = profiled(model, x)
    first.save(tmp_path / "times.json")
    data = json.loads((tmp_path / "times.json").read_text())
    data["setting"]["machine"] = "another"
    (tmp_path / "times.json").write_text(json.dumps(data))
    other = tdecomp.Profile.load(tmp_path / "times.json")
    with pytest.raises(ValueError, match=r"machine 'another'.*on_mismatch='remeasure'"):
        profiled(model, x, cache=other)
    clock.layers_timed.clear()
    assert profiled(model, x, cache=other, on_mismatch="remeasure") == first
    assert clock.layers_timed


class TestRefused:
    def test_no_inputs(self, model):
        for inputs in ((), (None,)):
            with pytest.raises(ValueError, match=r"got no example_inputs"):
                tdecomp.profile(model, *inputs)

    def test_a_cache_that_is_a_path(self, model, x):
        with pytest.raises(TypeError, match=r"cache: expected a Profile, got 'p\.json'.*load"):
            profiled(model, x, cache="p.json")

    def test_inputs_that_the_model_rejects(self, model):
        with pytest.raises(ValueError, match=r"rejected example_inputs"):
            profiled(model, torch.zeros(1, 5, 12, 12))

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
            profiled(model, x, **option)

    @pytest.mark.parametrize(
        "change, words",
        [
            (lambda m, x: (m, x[:1]), r"inputs .*\(2, 3, 12, 12\), now .*\(1, 3, 12, 12\)"),
            (lambda m, x: (m.double(), x.double()), r"dtype 'float32', now 'float64'"),
            (lambda m, x: (m[:6], x), r"model Sequential with .* now Sequential with"),
        ],
    )
    @pytest.mark.usefixtures("clock")
    def test_a_profile_of_something_else(self, model, x, change, words):
        times = profiled(model, x)
        other, inputs = change(model, x)
        with pytest.raises(ValueError, match=words):
            tdecomp.plan(
                other,
                "lowrank",
                rank=tdecomp.Budget(latency=0.5),
                example_inputs=inputs,
                profile=times,
                **QUIET,
            )
