"""Passes that wait for one another, and refits by them."""

import contextvars
import threading
from functools import partial

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import refit
from tdecomp.calibration.passes import batches_for
from tdecomp.recovery.lockstep import Passes, meetings, take_turns
from tdecomp.recovery.replaced import replaced_layers
from tdecomp.recovery.walk import Walk
from tests.recovery.networks import QUIET, decomposed, mlp, vectors
from tests.unchanged import unchanged

CPU = torch.device("cpu")


def runs(model, batches):
    return [partial(model, batch) for batch in batches]


def places(model, *names):
    return {name: model.get_submodule(name) for name in names}


@pytest.mark.parametrize("abreast", [False, True])
@torch.no_grad()
def test_all_batches_meet_at_each_place_in_order(abreast):
    model, original, batches = mlp(), mlp(), vectors()
    order = ["0", "2", "4"]
    found = []
    with (
        Passes(runs(model, batches), places(model, *order), before=True) as mine,
        Passes(runs(original, batches), places(original, *order), before=False) as theirs,
    ):
        for place, those in meetings(mine, theirs, order, abreast=abreast):
            found.append(place)
            assert [number for number, _, _ in those] == [0, 1, 2]
            for _, x, y in those:
                assert torch.equal(original.get_submodule(place)(x), y)
    assert found == order


@pytest.mark.parametrize("abreast", [False, True])
@torch.no_grad()
def test_what_is_changed_at_a_place_holds_for_the_rest_of_the_same_passes(abreast):
    model, original, batches = mlp(), mlp(), vectors()
    with (
        Passes(runs(model, batches), places(model, "0", "2"), before=True) as mine,
        Passes(runs(original, batches), places(original, "0", "2"), before=False) as theirs,
    ):
        for place, those in meetings(mine, theirs, ["0", "2"], abreast=abreast):
            if place == "0":
                model[0].weight.mul_(2.0)
            else:
                for number, x, y in those:
                    assert torch.equal(x, model[:2](batches[number]))
                    assert torch.equal(y, original[:3](batches[number]))


@torch.no_grad()
def test_a_pass_of_the_original_runs_at_the_same_time():
    model, original, batch = mlp(), mlp(), vectors()[0]
    both = threading.Barrier(2)  # nobody leaves before the other one is there
    with (
        Passes([lambda: (both.wait(10), model(batch))], places(model, "0"), before=True) as mine,
        Passes([lambda: (both.wait(10), original(batch))], places(original, "0"), before=False)
        as theirs,
    ):  # fmt: skip
        assert [place for place, _ in meetings(mine, theirs, ["0"], abreast=True)] == ["0"]


def test_models_that_share_a_module_run_in_turn():
    original = mlp()
    smaller = decomposed(original)
    found = batches_for("refit", vectors())
    walk = Walk.through(smaller, original, replaced_layers(smaller, original, "refit"), found, CPU)
    assert not walk._share_modules()
    smaller[1] = original[1]
    assert walk._share_modules()


@torch.no_grad()
def interrupted(model, batches, stops):
    with Passes(runs(model, batches), places(model, "0", "2", "4"), before=True) as passes:
        for one in passes.all[:stops]:
            passes.advance(one)
        raise KeyboardInterrupt


def test_every_thread_ends_and_no_hook_stays_whenever_it_is_left():
    model, batches = mlp(), vectors(30)
    before = threading.active_count()
    for stops in range(4):
        with unchanged(model), pytest.raises(KeyboardInterrupt):
            interrupted(model, batches, 10 * stops)
        assert threading.active_count() == before
        assert not model[0]._forward_pre_hooks


def test_an_error_of_the_model_is_raised_where_the_passes_are_run():
    class Fails(nn.Module):
        def forward(self, x):
            if len(x) == 5:
                raise RuntimeError("five")
            return x

    model = nn.Sequential(*mlp()[:2], Fails(), *mlp()[2:])
    batches = [*vectors(), torch.zeros(5, 16)]
    small, before = decomposed(model), threading.active_count()
    with unchanged(small, model), pytest.raises(ValueError, match=r"rejected a batch.*five"):
        refit(small, model, batches, inplace=True, **QUIET)
    assert threading.active_count() == before


VARIABLE = contextvars.ContextVar("VARIABLE", default=0)


class Settings(nn.Module):
    """Notes what the thread that runs it is set to."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = nn.Linear(16, 16), set()

    def forward(self, x):
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        default = torch.get_default_device().type
        self.seen.add((grad, inference, autocast, default, VARIABLE.get()))
        return self.inner(x)


@pytest.mark.parametrize(
    "block",
    [
        torch.no_grad,
        torch.inference_mode,
        torch.enable_grad,
        partial(torch.autocast, "cpu", torch.bfloat16),
        partial(torch.device, "meta"),
    ],
)
def test_passes_run_with_the_settings_of_the_thread_that_makes_them(block):
    model, batches = Settings(), vectors()
    token = VARIABLE.set(7)
    with block():
        model(batches[0])
        with Passes(runs(model, batches), places(model, "inner"), before=True) as passes:
            while any(not one.over for one in passes.all):
                for one in passes.all:
                    if not one.over:
                        passes.advance(one)
    VARIABLE.reset(token)
    assert len(model.seen) == 1


class Keeps(nn.Module):
    """Reads what it wrote itself a moment ago."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(32, 8)

    def forward(self, x):
        self.kept = x
        y = self.first(x).relu()
        return self.last(torch.cat([y, self.kept], dim=1)) if len(y) == len(self.kept) else y


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.first(x + 0.1 * torch.rand(x.shape))
        return self.last(y + torch.rand(y.shape))


class Holds(nn.Module):
    """Whose passes cannot wait for one another."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)
        object.__setattr__(self, "lock", threading.Lock())

    def forward(self, x):
        with self.lock:
            return self.last(self.first(x).relu())

    def __deepcopy__(self, memo):
        twin = Holds()
        twin.load_state_dict(self.state_dict())
        return twin


class ByThread(nn.Module):
    """Which runs in one thread only."""

    own = threading.local()

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)
        self.own.scale = 2.0

    def forward(self, x):
        return self.last(self.own.scale * self.first(x).relu())


def shown(model, batches):
    """Whether passes through the layers take turns."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return take_turns(runs(model, batches), places(model, *names), patience=1.0)


@torch.no_grad()
def test_passes_take_turns_only_where_that_makes_no_difference():
    batches, before = vectors(2), threading.active_count()
    assert shown(mlp(), batches)
    for kind in (Keeps, Draws, Holds, ByThread):
        assert not shown(kind(), batches), kind
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", [Keeps, Draws, ByThread])
def test_models_whose_passes_take_no_turns_are_refitted_all_the_same(kind):
    torch.manual_seed(0)
    original, batches = kind(), vectors(30)
    model = decomposed(original, rank=3)
    recovery = refit(model, original, batches, **QUIET)
    assert list(recovery.layers) == ["first", "last"]
    if kind is not Draws:
        assert recovery.error_after < recovery.error_before


class Counting(nn.Module):
    """Counts what it has been given, in a number that no pass reads."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.samples = inner, {"original": 0}

    def forward(self, x):
        self.samples["original"] += len(x)
        return self.inner(x)


def test_it_takes_one_pass_whatever_the_depth():
    found = []
    for depth in (2, 12):
        torch.manual_seed(0)
        layers = [part for _ in range(depth) for part in (nn.Linear(16, 16), nn.ReLU())]
        original, batches = Counting(nn.Sequential(*layers)), vectors(10)
        model = decomposed(original, rank=3)
        original.samples["original"] = 0
        refit(model, original, batches, gradients=False, **QUIET)
        found.append(original.samples["original"])
    assert found[0] == found[1] <= 2 * 640


def walked(model, original, batches):
    """What a walk shows at each chain, by its name."""
    given = batches_for("refit", batches)
    replaced = replaced_layers(model, original, "refit")
    with torch.no_grad():
        walk = Walk.through(model, original, replaced, given, CPU)
        items, _ = walk.items(replaced, CPU)
        return {
            layer.name: [(item.held, call) for item, calls in arrivals for call in calls]
            for layer, arrivals in walk.arrivals(replaced, items)
        }


def test_one_by_one_a_walk_shows_the_same_as_in_lockstep():
    original, batches = Keeps(), vectors(4)
    model = decomposed(original)
    one_by_one = walked(model, original, batches)
    for one in (model, original):  # with nothing that it writes, passes can take turns
        one.forward = partial(without_state, one)
    together = walked(model, original, batches)
    for name, calls in together.items():
        assert [held for held, _ in calls].count(True) == 1
        for (_, mine), (_, other) in zip(calls, one_by_one[name], strict=True):
            assert all(map(torch.equal, mine, other))


def without_state(model, x):
    return model.last(torch.cat([model.first(x).relu(), x], dim=1))


def test_a_batch_that_does_not_reach_a_chain_holds_up_nobody():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            y = self.first(x).relu()
            return y if len(x) < 10 else self.last(y)

    original = Ends()
    model = decomposed(original)
    found = walked(model, original, [*vectors(), torch.randn(4, 16)])
    assert [len(calls) for calls in found.values()] == [4, 3]


def test_chains_in_another_order_are_solved_in_the_order_of_the_first_batch():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.b(self.a(x)) if len(x) > 8 else self.a(self.b(x))

    original = Either()
    model = decomposed(original)
    few = torch.randn(8, 16)
    found = walked(model, original, [*vectors(), few])
    assert list(found) == ["a", "b"]
    with torch.no_grad():
        for name, layer in (("a", original.a), ("b", original.b)):
            assert [len(call[0]) for _, call in found[name]].count(64) == 3
            for _, (x, y) in found[name]:
                assert x.shape == y.shape
                if len(x) == 64 and name == "a":
                    assert torch.equal(layer(x), y)


def test_as_many_batches_as_the_memory_holds_are_fitted_to():
    original, batches = mlp(), vectors(40)
    model = decomposed(original)
    each = 3 * 4 * 44  # a sample's inputs and outputs in two models, at the widest layer
    found = walked(model, original, tdecomp.Data(batches, max_memory=64 * 10 * each))
    assert 8 <= len(found["0"]) <= 11
    assert any(held for held, _ in found["0"])
    recovery = refit(model, original, tdecomp.Data(batches, max_memory=1), **QUIET)
    assert any("max_memory" in note for note in recovery.notes)
