"""The public functions with their work done elsewhere."""

import copy
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.svd import SVD
from tdecomp.layers.spec import KINDS
from tests.posting import Posting
from tests.unchanged import changes, state_of

pytestmark = pytest.mark.usefixtures("one_thread")  # as each worker has
QUIET = {"progress": False}


class Net(nn.Module):
    """Convolutions, grouped and not, Linears, and a table that is tied to an output layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(40, 24), nn.Linear(24, 40, bias=False)
        self.head.weight = self.table.weight
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.deeper = nn.Conv2d(16, 24, 3, groups=2, padding=1)
        self.mix, self.narrow = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, tokens):
        x = self.table(tokens)[:, None]
        y = self.deeper(self.conv(x).relu()).mean(1) + x[:, 0]
        return self.head(self.narrow(self.mix(y).relu()))


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(40, (8, 12), generator=generator) for _ in range(2)]


BUDGET = {"methods": "auto", "rank": tdecomp.Budget(params=0.6)}
CALLS = {
    "budget": BUDGET,
    "budget on data": {**BUDGET, "data": batches()},
    "ratio": {"methods": ["cp", "svd"], "rank": 0.4, "data": batches()},
    "energy": {"methods": ["tucker2", "svd"], "rank": {"*": tdecomp.Energy(0.8), "mix": 5}},
    "outputs": {"methods": "dense", "rank": tdecomp.OutputVariance(0.7), "data": batches()},
}


def same(one, other):
    """Whether two results are the same bit for bit."""
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    rows = zip(one.report, other.report, strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and all(
        replace(a, fit_seconds=None) == replace(b, fit_seconds=None) for a, b in rows
    )


@pytest.mark.parametrize("call", CALLS)
def test_results_are_those_made_in_turn(call):
    model, executor = Net(), Posting()
    before = state_of(model)
    expected = tdecomp.decompose(model, **CALLS[call], **QUIET)
    found = tdecomp.decompose(model, **CALLS[call], **QUIET, executor=executor)
    assert any(row.method for row in found.report)
    assert same(found, expected)
    assert executor.sent
    assert not changes(before, state_of(model))


@pytest.mark.parametrize("call", CALLS)
def test_plans_are_those_made_in_turn(call):
    executor = Posting()
    expected = tdecomp.plan(Net(), **CALLS[call], **QUIET)
    found = tdecomp.plan(Net(), **CALLS[call], **QUIET, executor=executor)
    assert found.to_json() == expected.to_json()
    assert executor.sent


def test_sensitivities_are_those_made_in_turn():
    executor, data = Posting(), tdecomp.Data(batches(), held_out=0.5)
    expected = tdecomp.sensitivity(Net(), "auto", data=data, **QUIET)
    found = tdecomp.sensitivity(Net(), "auto", data=data, **QUIET, executor=executor)
    assert found.to_dict() == expected.to_dict()
    assert len(executor.sent) == 5


def test_the_callers_threads_are_an_executor_like_any_other():
    with ThreadPoolExecutor(2) as executor:
        found = tdecomp.decompose(Net(), **CALLS["budget"], **QUIET, executor=executor)
    assert same(found, tdecomp.decompose(Net(), **CALLS["budget"], **QUIET))


# What travels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_a_weight_travels_at_most_twice_and_alone(call):
    executor, model = Posting(), Net()
    tdecomp.decompose(model, **CALLS[call], **QUIET, executor=executor)
    for name, layer in model.named_modules():
        if name not in ("", "head"):  # which has the weight of the table
            with torch.no_grad():
                values = layer.weight.numpy().tobytes()
            assert 0 < sum(sent.count(values) for sent in executor.sent) <= 2
    biases = [layer.bias.detach().numpy().tobytes() for layer in (model.conv, model.mix)]
    assert not any(bias in sent for bias in biases for sent in executor.sent)
    assert not any(b"nn.modules" in sent for sent in executor.sent)


def test_ranks_that_need_no_values_let_weights_travel_once():
    executor = Posting()
    tdecomp.decompose(Net(), "svd", rank=4, include="mix", **QUIET, executor=executor)
    assert len(executor.sent) == 1


def test_gradients_do_not_travel_with_fits():
    executor, moments = Posting(), tdecomp.calibrate(Net(), batches(), **QUIET)
    tdecomp.decompose(Net(), "svd", rank=4, data=moments, include="mix", **QUIET, executor=executor)
    (sent,) = executor.sent
    assert moments["mix"].mean.numpy().tobytes() in sent
    assert moments["mix"].gradient.numpy().tobytes() not in sent


def test_what_moments_know_of_earlier_calls_does_not_travel_again():
    model, executor = Net(), Posting()
    moments = tdecomp.calibrate(model, batches(), **QUIET)
    call = {**BUDGET, "data": moments, **QUIET, "executor": executor}
    plan = tdecomp.plan(model, **call)
    count = len(executor.sent)
    assert count
    assert tdecomp.plan(model, **call).to_json() == plan.to_json()
    result = tdecomp.apply(model, plan, data=moments, **QUIET, executor=executor)
    assert len(executor.sent) == count
    assert same(result, tdecomp.apply(model, plan, data=batches(), **QUIET))


@pytest.mark.parametrize("call", [tdecomp.sensitivity, tdecomp.plan])
def test_of_fits_that_only_tell_errors_nothing_else_comes_back(call):
    model, executor = nn.Sequential(nn.Linear(160, 160)), Posting()
    data = tdecomp.Data([torch.randn(64, 160) for _ in range(4)], held_out=0.5)
    options = {} if call is tdecomp.sensitivity else {"rank": tdecomp.Budget(params=0.5)}
    call(model, "svd", data=data, **options, **QUIET, executor=executor)
    assert 0 < sum(map(len, executor.returned)) < model[0].weight.nbytes / 2


FITS = []  # the shape, the rank and whether it is to data, of each fit


class Counted(SVD):
    """Its fits are written down."""

    name = "counted"

    def fit(self, kernel, rank, *args, **options):
        FITS.append((kernel.shape, rank, False))
        return super().fit(kernel, rank, *args, **options)

    def fit_to(self, kernel, rank, *args, **options):
        FITS.append((kernel.shape, rank, True))
        return super().fit_to(kernel, rank, *args, **options)


class Drafted(Counted):
    """Only its fits tell what a rank loses."""

    name = "drafted"

    def lost_at_every_rank(self, *_, **__):
        return None


@pytest.mark.parametrize("executor", [None, Posting()], ids=["in turn", "executor"])
@pytest.mark.parametrize("data", ["none", "batches", "moments"])
@pytest.mark.parametrize("method", [Counted(), Drafted()], ids=lambda method: method.name)
@pytest.mark.parametrize("rank", [0.5, tdecomp.Budget(params=0.5)], ids=["ratio", "budget"])
def test_no_layer_is_fitted_twice_at_one_rank(rank, method, data, executor):
    torch.manual_seed(0)
    model, given = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 20)), None
    if data != "none":
        given = [torch.randn(64, 32) for _ in range(2)]
    if data == "moments":
        given = tdecomp.calibrate(model, given, **QUIET)
    call = {"rank": rank, "data": given, "executor": executor, **QUIET}
    FITS.clear()
    plan = tdecomp.plan(model, method, **call)
    if data == "moments":  # which keep fits
        report = tdecomp.apply(model, plan, data=given, executor=executor, **QUIET).report
    else:
        FITS.clear()
        report = tdecomp.decompose(model, method, **call).report
    assert len(FITS) == len(set(FITS))
    layers = [(layer, row) for layer, row in zip(model[::2], report, strict=True) if row.method]
    assert layers
    for layer, row in layers:
        assert (layer.weight.shape, row.rank, data != "none") in FITS
    FITS.clear()
    if data == "moments":
        tdecomp.decompose(model, method, **call)
    assert not FITS


# What fails -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fails(SVD):
    """No fit of it succeeds."""

    name = "fails"

    def fit(self, *_, **__):
        raise ZeroDivisionError("no")


def message(call, *args, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the texts are compared
        call(*args, **options, **QUIET)
    return str(caught.value)


@pytest.mark.parametrize(
    "methods, rank", [(Fails(), 4), ("cp", tdecomp.Energy(0.9)), ("svd", tdecomp.OutputVariance(1))]
)
def test_errors_are_those_of_work_in_turn(methods, rank):
    in_turn = message(tdecomp.decompose, Net(), methods, rank=rank, include=["mix", "conv"])
    options = {"rank": rank, "include": ["mix", "conv"], "executor": Posting()}
    assert message(tdecomp.decompose, Net(), methods, **options) == in_turn
    assert "'mix'" in in_turn or "'conv'" in in_turn


@dataclass(frozen=True)
class NoLosses(SVD):
    """It cannot say what a rank loses."""

    name = "no-losses"

    def lost_at_every_rank(self, *_, **__):
        raise ZeroDivisionError("no")


@pytest.mark.parametrize("executor", [None, Posting()])
def test_an_error_while_ranks_are_looked_at_names_the_layer(executor):
    rank = tdecomp.Budget(params=0.5)
    found = message(tdecomp.plan, Net(), NoLosses(), rank=rank, include="mix", executor=executor)
    assert "layer 'mix' (Linear(24→24))" in found
    assert "ZeroDivisionError" in found
    assert "exclude=['mix']" in found


@dataclass(frozen=True)
class FailsAsTable(SVD):
    """Its factors of an output layer are none of a table."""

    name = "fails-as-table"

    def factors_of(self, *_):
        raise ZeroDivisionError("no")


@pytest.mark.parametrize("executor", [None, Posting()])
def test_an_error_of_a_layer_that_follows_another_names_them(executor):
    options = {"rank": 4, "include": ["head", "table"], "executor": executor}
    found = message(tdecomp.decompose, Net(), FailsAsTable(), **options)
    assert "layer 'head' (Linear(24→40, no bias)): fails-as-table at rank 4 failed" in found
    assert "ZeroDivisionError" in found


@dataclass(frozen=True)
class Locked(SVD):
    """It cannot be pickled."""

    name = "locked"
    lock: object = field(default_factory=threading.Lock)


def test_a_method_that_cannot_travel_is_refused():
    with pytest.raises(TypeError, match=r"layer 'mix' .*cannot be sent.*top level of a module"):
        tdecomp.decompose(Net(), Locked(), rank=4, include="mix", **QUIET, executor=Posting())


@pytest.mark.parametrize("call", ["plan", "apply", "decompose", "sensitivity"])
def test_an_executor_is_checked_before_anything_is_done(call):
    model, executor = Net(), ThreadPoolExecutor(1)
    plan = tdecomp.plan(model, "svd", rank=4, **QUIET)
    executor.shutdown()

    def never():
        raise AssertionError("the data was looked at")
        yield

    options = {"data": never(), "executor": executor, **QUIET}
    if call != "apply":
        options["methods"] = "svd"
    if call in ("plan", "decompose"):
        options["rank"] = 4
    args = (model, plan) if call == "apply" else (model,)
    with pytest.raises(ValueError, match=r"executor: .*was shut down"):
        getattr(tdecomp, call)(*args, **options)


# Other processes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deadly(SVD):
    """Ends the process that fits it, unless that is the one of this number."""

    name = "deadly"
    survivor: int = 0

    def fit(self, kernel, rank):
        if os.getpid() != self.survivor:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(kernel, rank)


@pytest.fixture(scope="module")
def pool():
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) as executor:
        yield executor


def test_spawned_processes_find_the_same_bits(pool):
    expected = tdecomp.decompose(Net(), **CALLS["budget on data"], **QUIET)
    found = tdecomp.decompose(Net(), **CALLS["budget on data"], **QUIET, executor=pool)
    assert same(found, expected)
    assert not any(parameter.is_shared() for parameter in found.model.parameters())


def test_a_layer_of_a_kind_that_a_worker_does_not_know(pool, monkeypatch):
    kind = copy.copy(KINDS["Linear"])
    kind.name = "Own"
    monkeypatch.setitem(KINDS, "Own", kind)
    with pytest.raises(ValueError, match=r"layer 'mix' \(Own.*in every worker.*initializer"):
        tdecomp.decompose(Net(), "svd", rank=4, include="mix", **QUIET, executor=pool)


def test_a_method_of_a_module_that_a_worker_cannot_import(pool, tmp_path, monkeypatch):
    (tmp_path / "own_method.py").write_text(
        "from dataclasses import dataclass\nfrom tdecomp import SVD\n"
        "@dataclass(frozen=True)\nclass Own(SVD):\n    name = 'own'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from own_method import Own

    with pytest.raises(ValueError, match=r"layer 'mix' .*No module named 'own_method'.*PYTHONPATH"):
        tdecomp.decompose(Net(), Own(), rank=4, include="mix", **QUIET, executor=pool)
    del sys.modules["own_method"]


def test_a_worker_that_dies_leaves_its_layers_to_this_process(pool):
    method = Deadly(survivor=os.getpid())  # the last one to use the pool
    with pytest.warns(UserWarning, match="workers were lost .*in this process"):
        found = tdecomp.decompose(Net(), method, rank=4, **QUIET, executor=pool)
    assert same(found, tdecomp.decompose(Net(), method, rank=4, **QUIET))
    with pytest.raises(ValueError, match="its workers died"):
        tdecomp.plan(Net(), "svd", rank=4, **QUIET, executor=pool)
