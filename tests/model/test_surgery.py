"""Every slot, every optimizer, and all of it or nothing."""

import collections
import copy
import inspect
import signal
import sys
import types
import weakref
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import tdecomp
from tdecomp.layers.chain import Chain
from tdecomp.model import optimizers, surgery
from tdecomp.runtime.torch_state import restoring
from tests.models import METHODS, MODELS
from tests.unchanged import same_state, state_of, unchanged


def decompose(model, rank=2, **options):
    options.setdefault("inplace", True)
    return tdecomp.decompose(model, METHODS, rank=rank, progress=False, **options)


# Slots -------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "layer label")


class Slotted:
    """Holds a layer in a slot, under a name that Python changes, and another slot is empty."""

    __slots__ = ("__layer", "empty")

    def __init__(self, layer):
        self.__layer = layer

    @property
    def held(self):
        return self.__layer


@dataclass(frozen=True, slots=True)
class Frozen:
    layer: nn.Module


PLACES = {
    "attribute": lambda fc: fc,
    "module list": lambda fc: nn.ModuleList([nn.Linear(12, 12), fc]),
    "module dict": lambda fc: nn.ModuleDict({"a": fc}),
    "nested": lambda fc: nn.Sequential(OrderedDict(a=nn.Sequential(nn.ReLU(), fc))),
    "list": lambda fc: [fc, fc, 1],
    "dict": lambda fc: {"a": fc, 3: "x"},
    "tuple": lambda fc: (fc, "label", fc),
    "namedtuple": lambda fc: Pair(fc, "label"),
    "deque": lambda fc: deque([fc]),
    "dict of lists": lambda fc: {"a": [{"b": fc}], "c": [(fc, 1)]},
    "list in a tuple": lambda fc: ([fc], 1),
    "tuple in a tuple": lambda fc: ((fc,), 1),
    "module in a list": lambda fc: [nn.Sequential(fc)],
    "set": lambda fc: {fc},
    "object": lambda fc: types.SimpleNamespace(fc=fc),
    "frozenset": lambda fc: frozenset({fc, "label"}),
    "frozenset in a tuple": lambda fc: (frozenset({fc}), {"a": frozenset({(fc,)})}),
    "key": lambda fc: {"a": 1, fc: "x", (fc, 3): [fc], "b": 2},
    "key and value": lambda fc: {fc: fc},
    "slot": Slotted,
    "slots of a dataclass": lambda fc: [Frozen(fc)],
    "read-only mapping": lambda fc: types.MappingProxyType({"a": fc, "b": (fc,)}),
}


class Everywhere(nn.Module):
    """One Linear, and the same in another kind of place."""

    def __init__(self, place):
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.again = PLACES[place](self.fc)

    def forward(self, x):
        return self.fc(x)


def held(value):
    """Every Linear and every chain that can be reached from `value`."""
    if isinstance(value, (nn.Linear, Chain)):
        return [value]
    if isinstance(value, (nn.Module, types.SimpleNamespace)):
        inside = [v for k, v in vars(value).items() if k != "training"]
    elif isinstance(value, (dict, types.MappingProxyType)):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, Slotted):
        inside = [value.held]
    elif isinstance(value, Frozen):
        inside = [value.layer]
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        inside = list(value)
    else:
        return []
    return [found for item in inside for found in held(item)]


CASES = [(place, inplace) for place in PLACES for inplace in (False, True)]
CASES.remove(("read-only mapping", False))  # which Python does not copy


@pytest.mark.parametrize("place, inplace", CASES)
def test_the_chain_stands_in_every_slot(place, inplace):
    model = Everywhere(place)
    old, before = model.fc, held(model)
    kind = type(model.again)
    result = decompose(model, include="fc", inplace=inplace).model
    after = held(result)
    assert before.count(old) > 1
    assert after.count(result.fc) == before.count(old)
    assert old not in after
    assert isinstance(result.fc, Chain)
    assert type(result.again) is (Chain if kind is nn.Linear else kind)
    if isinstance(result.again, dict):  # in the same order
        words = [key for key in result.again if isinstance(key, str)]
        assert words == [key for key in Everywhere(place).again if isinstance(key, str)]


def test_a_weak_reference_follows_in_place():
    model = Everywhere("list")
    model.again = [weakref.ref(model.fc)]
    model = decompose(model, inplace=True).model
    assert model.again[0]() is model.fc


def test_a_weak_proxy_does_not_get_in_the_way():
    model = Everywhere("list")
    model.again = [weakref.proxy(model.fc)]
    result = decompose(model, example_inputs=torch.randn(2, 12))
    assert isinstance(result.model.fc, Chain)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_namedtuple_stays_one(inplace):
    result = decompose(Everywhere("namedtuple"), inplace=inplace).model
    assert type(result.again) is Pair
    assert result.again.layer is result.fc


def test_the_order_of_the_layers_is_kept():
    model = MODELS["cnn"].build()
    names = [name for name, _ in model.features.named_children()]
    result = decompose(model).model
    assert [name for name, _ in result.features.named_children()] == names
    assert result is model


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])
@pytest.mark.parametrize("name", ["cnn", "nested", "twice", "attention", "tuple"])
def test_no_old_layer_and_no_old_parameter_is_left(name, inplace):
    case = MODELS[name]
    model = case.build()
    before = {id(p): n for n, p in model.named_parameters()}
    result = decompose(model, inplace=inplace)
    rows = [row for row in result.report if row.method is not None]
    names = {r.name for r in rows} | {r.name.replace("proj_weight", "proj_bias") for r in rows}
    gone = {n for n in before.values() if {n, n.rpartition(".")[0]} & names}
    kept = set(before.values()) - gone
    now = {id(p) for p in result.model.parameters()}
    if inplace:
        assert {before[i] for i in now if i in before} == kept
    else:
        assert not now & set(before)
    for row in rows:
        for slot in row.names:
            assert result.model.get_submodule(slot) is result.model.get_submodule(row.name)
            assert isinstance(result.model.get_submodule(slot), Chain)


def test_the_model_itself_cannot_be_replaced_in_place():
    model = nn.Linear(16, 16)
    with unchanged(model), pytest.raises(ValueError, match="leave inplace=False") as caught:
        decompose(model)
    assert "use result.model" in str(caught.value)
    assert isinstance(decompose(model, inplace=False).model, Chain)


def test_a_model_that_cannot_be_copied_says_what_to_do():
    class Locked(nn.Sequential):
        def __deepcopy__(self, memo):
            raise RuntimeError("locked")

    model = Locked(nn.Linear(16, 16))
    with unchanged(model), pytest.raises(ValueError, match=r"RuntimeError\('locked'\)") as caught:
        decompose(model, inplace=False)
    assert "use inplace=True" in str(caught.value)
    assert isinstance(decompose(model).model[0], Chain)


def test_a_model_whose_copy_is_no_module_says_what_to_do():
    class Answers(Everywhere):
        def __getattr__(self, name):
            return super().__getattr__(name) if name in ("fc", "again") else lambda *_: None

    with pytest.raises(ValueError, match=r"its copy is None.*use inplace=True"):
        decompose(Answers("list"), inplace=False)


def test_old_weights_are_not_copied(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    copied = []
    original = nn.Parameter.__deepcopy__

    def deepcopy(self, memo):
        copied.append(tuple(self.shape))
        return original(self, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", deepcopy)
    decompose(model, include="0", inplace=False)
    assert sorted(copied) == [(4,), (4, 64)]


# Optimizers --------------------------------------------------------------------------------------

OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls)
    and issubclass(cls, torch.optim.Optimizer)
    and cls is not torch.optim.Optimizer
}
OPTIONS = {
    "sgd with momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "fused sgd with momentum": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "sgd maximizing": (torch.optim.SGD, {"maximize": True, "weight_decay": 0.1}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "capturable": (torch.optim.Adam, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "centered rmsprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
} | {name.lower(): (cls, {}) for name, cls in OPTIMIZERS.items() if name != "SparseAdam"}


def network():
    # Only matrices, for Muon.
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 12, bias=False), nn.Tanh(),
        nn.Linear(12, 6, bias=False),
    )  # fmt: skip


X, Y = torch.linspace(-1, 1, 96).reshape(8, 12), torch.linspace(-1, 1, 48).reshape(8, 6).sin()


def train(model, *optimizers, steps=1):
    def closure():
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = (model(X) - Y).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.step(closure)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("which", ["0", "2"])
def test_the_next_step_trains_the_new_parameters_and_no_old_one(kind, which):
    cls, options = OPTIONS[kind]
    model = network()
    optimizer = cls(model.parameters(), lr=0.01, **options)
    train(model, optimizer, steps=2)
    old = model.get_submodule(which).weight
    untouched = [p for p in model.parameters() if p is not old]
    state = {id(p): copy.deepcopy(optimizer.state[p]) for p in untouched if p in optimizer.state}

    decompose(model, include=which, optimizers=optimizer)

    now = list(model.parameters())
    held_now = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held_now} == {id(p) for p in now}
    assert len(held_now) == len(now)
    assert old not in optimizer.state
    for p in untouched:
        # LBFGS has one state, of all parameters laid end to end.
        if id(p) in state and cls is not torch.optim.LBFGS:
            torch.testing.assert_close(optimizer.state[p], state[id(p)], rtol=0, atol=0)
    before, frozen = [p.detach().clone() for p in now], old.detach().clone()
    train(model, optimizer)
    assert all(not torch.equal(p, then) for p, then in zip(now, before, strict=True))
    assert torch.equal(old, frozen)

    # and it can be saved and brought back
    saved = copy.deepcopy(optimizer.state_dict())
    again = cls(model.parameters(), lr=0.5, **options)
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == 0.01
    train(model, again)


def test_every_optimizer_of_torch_is_tried():
    assert {cls for cls, _ in OPTIONS.values()} == set(OPTIMIZERS.values()) - {
        torch.optim.SparseAdam
    }


def test_sparse_adam_follows_too():
    # It steps on sparse gradients only, which no Linear has.
    model = network()
    optimizer = torch.optim.SparseAdam(list(model.parameters()))
    decompose(model, include="0", optimizers=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in model.parameters()
    }


def test_an_untrained_optimizer_follows():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    decompose(model, optimizers=optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_groups_keep_their_options_and_their_members():
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 6))
    optimizer = torch.optim.AdamW(
        [
            {"params": [model[0].weight, model[2].weight], "lr": 0.01, "weight_decay": 0.3},
            {"params": [model[0].bias, model[2].bias], "lr": 0.1, "weight_decay": 0.0},
        ]
    )
    groups = list(optimizer.param_groups)
    train(model, optimizer)
    options = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    decompose(model, include="0", optimizers=optimizer)

    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == options
    chain = model[0]
    # in the place of the old ones, so that a saved state still fits
    assert [id(p) for p in groups[0]["params"]] == [
        id(p) for p in (chain[0].weight, chain[1].weight, model[2].weight)
    ]
    assert [id(p) for p in groups[1]["params"]] == [id(p) for p in (chain[1].bias, model[2].bias)]


def test_several_optimizers_each_keep_their_own():
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 6))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(model[2].parameters())
    train(model, first, second)
    with unchanged(second):
        decompose(model, include="0", optimizers=[first, second])
    assert {id(p) for p in first.param_groups[0]["params"]} == {
        id(p) for p in model[0].parameters()
    }
    before = [p.detach().clone() for p in model.parameters()]
    train(model, first, second)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_an_optimizer_of_another_model_is_left_as_it_is():
    model, other = network(), network()
    optimizer = torch.optim.Adam(other.parameters())
    train(other, optimizer)
    mine = torch.optim.Adam(model.parameters())
    with unchanged(optimizer, other):
        decompose(model, optimizers=(mine, optimizer))


def test_a_module_used_twice_is_followed_once():
    model = MODELS["twice"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decompose(model, optimizers=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_a_scheduler_goes_on():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    decompose(model, optimizers=optimizer)
    train(model, optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_named_parameters_lose_their_names_rather_than_keep_wrong_ones():
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    decompose(model, include="0", optimizers=optimizer)
    group = optimizer.param_groups[0]
    assert len(group.get("param_names", group["params"])) == len(group["params"])
    torch.optim.SGD(model.parameters(), lr=0.1).load_state_dict(optimizer.state_dict())


def test_a_parameter_in_no_optimizer_is_reported():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12))
    optimizer = torch.optim.SGD([*model[0].parameters(), model[1].weight], lr=0.1)
    with pytest.warns(UserWarning, match="no optimizer had these replaced parameters: 1.bias, 2.b"):
        decompose(model, optimizers=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 5


def test_a_warning_made_an_error_changes_nothing():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with unchanged(model, optimizer), pytest.raises(UserWarning, match="no optimizer had"):
        decompose(model, optimizers=optimizer)


def test_a_frozen_layer_keeps_its_place():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decompose(model, optimizers=optimizer)
    assert [p.requires_grad for p in optimizer.param_groups[0]["params"]] == [
        False, False, True, True, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("many", [True, False])
def test_optimizers_need_inplace(many):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unchanged(model, optimizer), pytest.raises(ValueError, match="use inplace=True"):
        decompose(model, inplace=False, optimizers=[optimizer] if many else optimizer)


def test_what_is_no_optimizer():
    model = network()
    with unchanged(model), pytest.raises((TypeError, ValueError), match="optimizers"):
        decompose(model, optimizers=model.parameters())


# All or nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["0", "4"])
def test_a_failure_leaves_an_lbfgs_as_it_was(which):
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01)
    train(model, optimizer)
    listed = optimizer.param_groups[0]["params"]
    optimizer.state = State(optimizer.state, interrupt_at(1, KeyboardInterrupt()), True, "clear")
    state = {id(p): _frozen_state(s) for p, s in optimizer.state.items()}
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        decompose(model, include=which, optimizers=optimizer)
    assert {id(p): _frozen_state(s) for p, s in optimizer.state.items()} == state
    assert optimizer.param_groups[0]["params"] is listed is optimizer._params
    assert [id(p) for p in listed] == [id(p) for p in model.parameters()]
    train(model, optimizer)


def _frozen_state(state):
    return {key: id(value) for key, value in state.items()}


def trained():
    model = MODELS["nested"].build()
    model.extra = [(model.stem[0], 1), {"a": model.heads["a"]}]
    named = dict(model.named_parameters())
    weights = [p for n, p in named.items() if n.endswith("weight")]
    biases = [p for n, p in named.items() if n.endswith("bias")]
    first = torch.optim.Adam([{"params": weights, "lr": 0.01}, {"params": biases[:1]}])
    second = torch.optim.SGD(biases[1:], lr=0.1, momentum=0.9)
    model(MODELS["nested"].inputs()).square().mean().backward()
    first.step()
    second.step()
    return model, first, second


def interrupt_at(step, error):
    """A wrapper that raises `error` instead of, or right after, the `step`-th call."""
    calls = 0

    def wrap(function, after=False):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step and not after:
                raise error
            value = function(*args, **kwargs)
            if calls == step:
                raise error
            return value

        return call

    wrap.count = lambda: calls
    return wrap


ERRORS = [RuntimeError("no"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=["error", "^C"])
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_a_failure_in_the_fit_of_any_layer_changes_nothing(layer, error, monkeypatch):
    model, *optimizers = trained()
    # LowRank has its fit from SVD.
    monkeypatch.setattr(tdecomp.SVD, "fit", interrupt_at(layer, error)(tdecomp.SVD.fit))
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ValueError
    with unchanged(model, *optimizers), pytest.raises(expected) as caught:
        decompose(model, optimizers=optimizers)
    if expected is ValueError:
        name = ["stem.0", "stem.1", "heads.a", "heads.b.1"][layer - 1]
        assert f"layer {name!r}" in str(caught.value)
        assert "RuntimeError: no" in str(caught.value)
        assert f"exclude=[{name!r}]" in str(caught.value)


class Tripwire(dict):
    """A dict of slots whose assignments count and fail at one of them."""

    def __init__(self, items, put):
        super().__init__(items)
        self.put = put

    def __setitem__(self, key, value):
        self.put(super().__setitem__)(key, value)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", ERRORS, ids=["error", "^C"])
@pytest.mark.parametrize("slot", [1, 2, 3, 4])
def test_a_failure_at_any_slot_changes_nothing(slot, error, after):
    model, *optimizers = trained()
    wrap = interrupt_at(slot, error)
    for holder in (model.stem, model.heads, model.heads["b"]):
        tripwire = Tripwire(holder._modules, lambda put: wrap(put, after))
        object.__setattr__(holder, "_modules", tripwire)
    with unchanged(model, *optimizers), pytest.raises(type(error)):
        decompose(model, optimizers=optimizers)
    assert wrap.count() >= slot


class Params(list):
    """The parameters of an optimizer's group; their assignments count and fail at one of them."""

    def __init__(self, items, put):
        super().__init__(items)
        self.put = put

    def __setitem__(self, key, value):
        self.put(super().__setitem__)(key, value)


class State(collections.defaultdict):
    """An optimizer's state; the calls of one of its methods count and fail at one of them."""

    def __init__(self, items, wrap, after, method):
        super().__init__(dict, items)
        # On the instance, where calls look first.
        setattr(self, method, wrap(getattr(self, method), after))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", ERRORS, ids=["error", "^C"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_failure_at_any_group_of_an_optimizer_changes_nothing(step, error, after):
    model, *optimizers = trained()
    wrap = interrupt_at(step, error)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["params"] = Params(group["params"], lambda put: wrap(put, after))
    with unchanged(model, *optimizers), pytest.raises(type(error)):
        decompose(model, optimizers=optimizers)
    assert wrap.count() > step


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", ERRORS, ids=["error", "^C"])
@pytest.mark.parametrize("step", [1, 8, 9, 16])
def test_a_failure_at_the_state_of_any_optimizer_changes_nothing(step, error, after):
    model, *optimizers = trained()
    wrap = interrupt_at(step, error)
    for optimizer in optimizers:
        optimizer.state = State(optimizer.state, wrap, after, "pop")
    with unchanged(model, *optimizers), pytest.raises(type(error)):
        decompose(model, optimizers=optimizers)
    assert wrap.count() == step


def run_until(line, function):
    """Run `function` until the surgery is at its `line`-th line, raise there; lines that it ran."""
    # Undoing is not interrupted, and the search for slots changes nothing.
    files = (surgery.__file__, optimizers.__file__)
    left_out, lines = ("restore", "put", "<lambda>", "_slots"), 0

    def on_line(_frame, event, _argument):
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == line:
                raise KeyboardInterrupt
        return on_line

    def on_call(frame, _event, _argument):
        code = frame.f_code
        inside = code.co_filename in files and code.co_name not in left_out
        return on_line if inside else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        function()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return lines


def chains_for(model):
    """The chains of a model by the layers that they are to replace, and a model that has them."""
    changed = decompose(model, inplace=False).model
    return {
        module: changed.get_submodule(name)
        for name, module in model.named_modules()
        if isinstance(changed.get_submodule(name), Chain)
    }, changed


def test_an_error_at_any_line_of_the_surgery_changes_nothing_or_all():
    model, *optimizers = trained()
    chains, changed = chains_for(model)
    with torch.no_grad():
        for tensor in surgery.tensors_in(changed).values():
            tensor.add_(1)
    before_all = (model, optimizers, chains, changed)

    def surgeon(model, optimizers, chains, changed):
        def operate():
            with restoring(model):
                surgery.swap(model, chains, optimizers, surgery.tensors_in(changed))

        return operate

    total = run_until(0, surgeon(*copy.deepcopy(before_all)))
    done = []
    # Most of the surgery is loops: every second line, and all of the last ones.
    for line in [*range(1, total - 40, 2), *range(total - 40, total + 1)]:
        model, optimizers, chains, changed = copy.deepcopy(before_all)
        operate, old = surgeon(model, optimizers, chains, changed), model.stem[0]
        before = [state_of(thing) for thing in (model, *optimizers)]
        assert run_until(line, operate) == line
        done.append(model.stem[0] is not old)
        if done[-1]:
            groups = [g for optimizer in optimizers for g in optimizer.param_groups]
            now = {id(p) for p in model.parameters()}
            assert {id(p) for g in groups for p in g["params"]} == now
        else:
            after = [state_of(thing) for thing in (model, *optimizers)]
            assert all(map(same_state, before, after))
    # It is decided once, and only the way out comes after that.
    assert done == sorted(done)
    assert sum(done) <= 4


def test_nothing_fails_without_an_interrupt():
    model, *optimizers = trained()
    decompose(model, optimizers=optimizers)
    assert all(isinstance(layer, Chain) for layer in model.stem)
    assert model.extra[0][0] is model.stem[0]
    assert model.extra[1]["a"] is model.heads["a"]
    groups = [g for optimizer in optimizers for g in optimizer.param_groups]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}


# Values ------------------------------------------------------------------------------------------


def recovered():
    """A model, its chains, and a copy with the chains of which every tensor has been changed."""
    model = nn.Sequential(
        nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 12), nn.Linear(12, 12)
    )
    model[3].bias = model[2].bias  # tied
    changed = decompose(model, include="0", inplace=False).model
    chains = {model[0]: changed[0]}
    with torch.no_grad():
        for tensor in changed.state_dict(keep_vars=True).values():
            tensor.mul_(2).add_(1)
    return model, chains, changed


def test_the_model_has_the_values_in_its_own_tensors():
    model, chains, changed = recovered()
    kept = {name: id(t) for name, t in surgery.tensors_in(model).items() if name[0] != "0"}
    x = torch.randn(5, 12)
    expected = changed.eval()(x)
    surgery.swap(model, chains, values=surgery.tensors_in(changed))
    assert torch.equal(model.eval()(x), expected)
    now = {name: id(t) for name, t in surgery.tensors_in(model).items() if name in kept}
    assert now == kept
    assert model[0] is changed[0]


def last(model):
    """The names of the kernels that are stored in channels_last."""
    form = torch.channels_last
    kernels = {name: p for name, p in model.named_parameters() if p.dim() == 4}
    return {name for name, p in kernels.items() if p.is_contiguous(memory_format=form)}


@pytest.mark.parametrize("fails", [False, True])
def test_all_kernels_are_in_the_layout_or_none_is(fails):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    changed = decompose(model, include="0", inplace=False).model
    optimizer = torch.optim.LBFGS(model.parameters())
    if fails:
        error = interrupt_at(1, RuntimeError("no"))
        optimizer.state = State(optimizer.state, error, False, "clear")
        with unchanged(model, changed), pytest.raises(RuntimeError, match="no"):
            surgery.swap(model, {model[0]: changed[0]}, [optimizer], layout="channels_last")
    else:
        surgery.swap(model, {model[0]: changed[0]}, [optimizer], layout="channels_last")
        assert last(model) == {n for n, p in model.named_parameters() if p.dim() == 4}


def test_adopt_is_the_model_with_the_other_ones_values():
    model, _, _ = recovered()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].running_mean.add_(1)
        other[2].weight.mul_(2)
    before = {name: (id(t), t._version) for name, t in surgery.tensors_in(model).items()}
    assert surgery.adopt(model, other) is model
    for name, tensor in surgery.tensors_in(model).items():
        assert torch.equal(tensor, surgery.tensors_in(other)[name])
        touched = name in ("1.running_mean", "2.weight")
        assert (id(tensor), tensor._version - touched) == before[name]


class Unwritable(torch.Tensor):
    """A tensor that cannot be written to."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_ and type(args[0]) is cls:
            raise RuntimeError("no")
        return super().__torch_function__(func, types, args, kwargs or {})


def fails_at_the_last(model, changed):
    model.register_buffer("last", torch.zeros(2).as_subclass(Unwritable))
    changed.register_buffer("last", torch.ones(2))
    return RuntimeError, "no"


def lacks_one(_, changed):
    changed.register_buffer("last", torch.ones(2))
    return ValueError, "no such tensor where 'last' of shape \\(2,\\) is to be copied"


def has_another_shape(model, changed):
    model.register_buffer("last", torch.zeros(3))
    changed.register_buffer("last", torch.ones(2))
    return ValueError, "one of shape \\(3,\\) where 'last' of shape \\(2,\\)"


@pytest.mark.parametrize("wrong", [fails_at_the_last, lacks_one, has_another_shape])
@pytest.mark.parametrize("how", ["swap", "adopt"])
def test_a_value_that_cannot_be_copied_changes_nothing(wrong, how):
    model, chains, changed = recovered()
    optimizer = torch.optim.Adam(model.parameters())
    if how == "adopt":
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed[2].weight.mul_(2)
    error, message = wrong(model, changed)
    values = surgery.tensors_in(changed)
    swap = partial(surgery.swap, model, chains, [optimizer], values)
    with unchanged(model, optimizer), pytest.raises(error, match=message):
        swap() if how == "swap" else surgery.adopt(model, changed)


def test_state_dicts_have_no_say():
    # Hooks of theirs may give copies, or other names.
    model, _, _ = recovered()
    other = copy.deepcopy(model)
    for module in (model, other):
        module.register_state_dict_post_hook(
            lambda _, state, *__: [state.update({k: v.clone()}) for k, v in state.items()]
        )
    with torch.no_grad():
        other[2].weight.mul_(2)
    assert torch.equal(surgery.adopt(model, other)[2].weight, other[2].weight)


def test_values_that_are_the_same_are_not_copied():
    # An expanded tensor cannot be written to.
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_buffer("mask", torch.zeros(1).expand(4))
    other = copy.deepcopy(model)
    other.mask = torch.zeros(1).expand(4)
    with torch.no_grad():
        other[0].bias.add_(1)
    surgery.adopt(model, other)
    assert torch.equal(model[0].bias, other[0].bias)


def test_an_interrupt_in_the_surgery_is_raised_when_it_is_done():
    model, *optimizers = trained()
    chains, changed = chains_for(model)
    holder = model.stem
    press = Tripwire(holder._modules, lambda put: interrupting(put))
    object.__setattr__(holder, "_modules", press)

    def interrupting(put):
        def call(*args):
            signal.raise_signal(signal.SIGINT)
            put(*args)

        return call

    with pytest.raises(KeyboardInterrupt):
        surgery.swap(model, chains, optimizers, surgery.tensors_in(changed))
    assert all(isinstance(layer, Chain) for layer in (*model.stem, model.heads["a"]))
    now = {id(p) for p in model.parameters()}
    assert {id(p) for o in optimizers for g in o.param_groups for p in g["params"]} == now
