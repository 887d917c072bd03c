"""Inputs at the boundary of what makes sense: they work, or are refused in words."""

import threading
from collections import deque
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.files import tensors
from tests.unchanged import unchanged

QUIET = {"progress": False}
X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


@pytest.fixture
def pair():
    original = net()
    return tdecomp.decompose(original, "svd", rank=4, **QUIET).model, original


def test_an_empty_batch_among_others_changes_nothing(pair):
    model, original = pair
    moments = [tdecomp.calibrate(net(), batches, **QUIET) for batches in ([X], [X[:0], X, X[:0]])]
    assert torch.equal(moments[0]["0"].matrix, moments[1]["0"].matrix)
    refitted = [tdecomp.refit(model, original, b, **QUIET) for b in ([X], [X[:0], X])]
    assert refitted[0].error_after == refitted[1].error_after
    trained = [tdecomp.distill(model, original, b, steps=4, **QUIET) for b in ([X], [X, X[:0]])]
    assert trained[0].error_after == trained[1].error_after
    with pytest.raises(ValueError, match="got no batches"):
        tdecomp.calibrate(net(), [X[:0]], **QUIET)


def test_batches_on_the_meta_device_are_refused():
    with pytest.raises(ValueError, match=r"calibrate: a batch .*\(64, 16\).*that hold values"):
        tdecomp.calibrate(net(), [X.to("meta")], **QUIET)


def test_sparse_batches_are_as_good_as_dense_ones(pair):
    model, original = pair
    batch = X * (X > 0)
    both = (batch, batch.to_sparse())
    moments = [tdecomp.calibrate(original, [b], gradients=False, **QUIET) for b in both]
    assert torch.equal(moments[0]["0"].matrix, moments[1]["0"].matrix)
    recovery = tdecomp.refit(model, original, [batch.to_sparse()], **QUIET)
    assert recovery.error_after < recovery.error_before


def test_nested_batches_are_refused_in_words(pair):
    model, original = pair
    batch = torch.nested.nested_tensor([X[:3], X[:2]], layout=torch.jagged)
    for run in (
        lambda: tdecomp.calibrate(original, [batch], **QUIET),
        lambda: tdecomp.refit(model, original, [batch], **QUIET),
        lambda: tdecomp.distill(model, original, [batch], steps=2, **QUIET),
    ):
        with pytest.raises(ValueError, match="got a nested tensor; expected padded ones"):
            run()
    plan = tdecomp.plan(original, "svd", rank=2, example_inputs=batch, **QUIET)
    assert {row.reason for row in plan} == {"it is called with a nested tensor"}


def test_what_is_no_model_is_refused_by_name(pair):
    model, original = pair
    result = tdecomp.decompose(original, "svd", rank=4, **QUIET)
    for run in (tdecomp.refit, tdecomp.distill):
        for got in ((result, original), (model, "original")):
            with pytest.raises(TypeError, match=f"{run.__name__}: expected models .*, got"):
                run(*got, [X], **QUIET)
    with pytest.raises(TypeError, match=r"recalibrate_batchnorm: expected models .*, got Decomp"):
        tdecomp.recalibrate_batchnorm(result, [X], **QUIET)
    with pytest.raises(TypeError, match=r"reduce_ranks: expected what .*, got Sequential"):
        tdecomp.reduce_ranks(model, rank=2, **QUIET)


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("given", [3, [3], ["0", None]], ids=str)
def test_what_are_no_names(option, given):
    with pytest.raises(TypeError, match=f"{option}: expected names or globs of layers, got"):
        tdecomp.plan(net(), "svd", rank=4, **{option: given}, **QUIET)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64], ids=str)
def test_layers_of_other_numbers_are_left_alone(dtype):
    model = net()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(dtype), requires_grad=False)
    report = tdecomp.decompose(model, "svd", rank=4, **QUIET).report
    assert f"weights of {dtype}" in report["0"].reason
    assert report["2"].method == "svd"


def test_any_default_device(pair):
    model, original = pair
    budget = {"rank": tdecomp.Budget(params=0.5), "data": [X], **QUIET}
    expected = tdecomp.decompose(original, "auto", **budget).model(X)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        assert torch.equal(tdecomp.decompose(original, "auto", **budget).model(X), expected)
        assert tdecomp.refit(model, original, [X], **QUIET).error_after < 2
        assert tdecomp.distill(model, original, [X], steps=3, **QUIET).error_after < 2
        varied = tdecomp.flip_and_shift(images, torch.Generator("cpu"))
        assert tdecomp.profile(original, X, "svd", **QUIET).fastest > 0
    assert varied.device.type == "cpu"


class Aside(nn.Module):
    """Its layer has no part in the output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        self.layer(x)
        return x * 2


def test_outputs_that_depend_on_nothing_that_can_be_trained():
    original = Aside()
    model = tdecomp.decompose(original, "svd", rank=4, **QUIET).model
    with unchanged(model), pytest.raises(ValueError, match="distill: the model's outputs depend"):
        tdecomp.distill(model, original, [X], steps=3, **QUIET)


def test_numbers_too_large_to_be_squared_are_told_from_nan(pair):
    with pytest.raises(ValueError, match=r"layer '0' .*too large to be squared"):
        tdecomp.calibrate(net(), [X * 1e25], **QUIET)
    with pytest.raises(ValueError, match=r"refit: layer '0' .*too large to be squared"):
        tdecomp.refit(*pair, [X * 1e25], **QUIET)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-25, 1e-20])
@pytest.mark.parametrize("varied", [True, False])
def test_inputs_too_small_to_say_anything_are_refitted_to(pair, size, varied):
    recovery = tdecomp.refit(*pair, [size * (X if varied else torch.ones_like(X))], **QUIET)
    assert recovery.error_after <= recovery.error_before + 1e-6


class InPlace(nn.Module):
    """It normalises its inputs in place, as preprocessing inside a model does."""

    def __init__(self):
        super().__init__()
        self.layers = net()

    def forward(self, x):
        return self.layers(x.mul_(2).sub_(1))


def test_a_model_that_changes_its_inputs_changes_no_batch_and_no_example():
    original, batches, example = InPlace(), [X.clone(), X.flip(0)], X[:2].clone()
    before = [x.clone() for x in (*batches, example)]
    plain = nn.Sequential(net())
    plain.load_state_dict({k.replace("layers", "0"): v for k, v in original.state_dict().items()})
    steps = ["refit", tdecomp.Distill(steps=3)]
    options = {"rank": tdecomp.Budget(macs=0.6), "recover": steps, **QUIET}
    result = tdecomp.decompose(original, "svd", data=batches, example_inputs=example, **options)
    assert all(torch.equal(x, y) for x, y in zip((*batches, example), before, strict=True))
    same = [2 * x - 1 for x in before]
    expected = tdecomp.decompose(plain, "svd", data=same[:2], example_inputs=same[2], **options)
    for one, other in zip(result.report.recovery, expected.report.recovery, strict=True):
        assert one.error_after == pytest.approx(other.error_after, rel=1e-3)


class Own(MutableMapping):
    """A mapping that keeps its items in an attribute."""

    def __init__(self, **items):
        self.items_held = items

    def __getitem__(self, key):
        return self.items_held[key]

    def __setitem__(self, key, value):
        self.items_held[key] = value

    def __delitem__(self, key):
        del self.items_held[key]

    def __iter__(self):
        return iter(self.items_held)

    def __len__(self):
        return len(self.items_held)


@dataclass
class Holder:
    x: object


@dataclass(slots=True)
class InSlots:
    x: object


@pytest.mark.parametrize(
    "wrap, unwrap",
    [
        (lambda x: Own(x=x), lambda batch: batch["x"]),
        (lambda x: Own(x=x, lock=threading.Lock()), lambda batch: batch["x"]),
        (Holder, lambda batch: batch.x),
        (lambda x: Holder(2 * x.requires_grad_()), lambda batch: batch.x),
        (InSlots, lambda batch: batch.x),
        (lambda x: (Holder(deque([x])), "label"), lambda batch: batch[0].x[0]),
        (lambda x: x.numpy(), torch.from_numpy),
        (lambda x: [Holder({"a": x.numpy()})], lambda batch: torch.from_numpy(batch[0].x["a"])),
    ],
    ids=[
        "mapping",
        "mapping with a lock",
        "object",
        "computed",
        "slots",
        "deque",
        "array",
        "array in an object",
    ],
)
def test_a_model_that_changes_what_a_batch_holds_changes_no_batch(wrap, unwrap):
    model, batch = InPlace(), wrap(X.clone())
    held = unwrap(batch)
    before = held.detach().clone()

    def forward(m, batch):
        return m(unwrap(batch))

    options = {"rank": 4, "forward": forward, "example_inputs": batch, **QUIET}
    tdecomp.decompose(model, "svd", data=[batch], recover=["refit"], **options)
    assert torch.equal(unwrap(batch), before)
    assert unwrap(batch).data_ptr() == held.data_ptr()


def test_an_augment_that_works_in_place_changes_no_batch():
    batch, original = X.clone(), net()
    model = tdecomp.decompose(original, "svd", rank=4, **QUIET).model

    def noisy(x, generator):
        return x.add_(0.1 * torch.randn(x.shape, generator=generator))

    moments = tdecomp.calibrate(original, [batch], augment=noisy, **QUIET)
    assert moments["0"].count > len(batch)
    tdecomp.refit(model, original, [batch], augment=noisy, **QUIET)
    tdecomp.distill(model, original, [batch], augment=noisy, steps=3, **QUIET)
    assert torch.equal(batch, X)


class OneBuffer:
    """A loader that fills one tensor again for each batch."""

    def __init__(self, batches):
        self.batches, self.buffer = batches, batches[0].clone()

    def __iter__(self):
        for batch in self.batches:
            yield self.buffer.copy_(batch)


@pytest.mark.parametrize("run", [tdecomp.refit, partial(tdecomp.distill, steps=3, augment=None)])
def test_a_loader_that_reuses_its_buffer(pair, run):
    batches = [X, 3 * X.flip(0)]
    recoveries = [run(*pair, given, **QUIET) for given in (batches, OneBuffer(batches))]
    errors = [(one.error_before, one.error_after) for one in recoveries]
    assert errors[0] == errors[1]


def lazy():
    return nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(16), nn.Linear(16, 4))


@pytest.mark.parametrize(
    "run",
    [
        lambda m: tdecomp.calibrate(m, [X], **QUIET),
        lambda m: tdecomp.decompose(m, "svd", rank=2, data=[X], **QUIET),
        lambda m: tdecomp.sensitivity(m, "svd", data=[X], **QUIET),
        lambda m: tdecomp.profile(m, X, "svd", **QUIET),
    ],
    ids=["calibrate", "decompose", "sensitivity", "profile"],
)
def test_lazy_layers_stay_lazy(run):
    model = lazy()
    with unchanged(model), pytest.raises(ValueError, match="layer '1' is lazy"):
        run(model)
    with unchanged(model):
        budget = tdecomp.Budget(macs=0.9)
        result = tdecomp.decompose(model, "svd", rank=budget, example_inputs=X, **QUIET)
    assert result.model(X).shape == (64, 4)
    assert result.report.speed is None


class Counting(nn.Module):
    """It changes its buffers by all ways that there are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        for name in ("by_data", "by_place", "by_name", "by_other_data"):
            self.register_buffer(name, torch.zeros(3))

    def forward(self, x):
        self.by_data.data.add_(1)
        self.by_place.add_(1)
        self.by_name = self.by_name + 1
        self.by_other_data.data = torch.ones(2)
        return self.layer(x)


def test_buffers_are_put_back_however_they_were_changed():
    model = Counting()
    with unchanged(model):
        tdecomp.decompose(
            model, "svd", rank=4, data=[X], example_inputs=X, recover=["refit"], **QUIET
        )


@pytest.mark.parametrize("kind", ["moments", "profile"])
def test_files_are_written_wholly_or_not_at_all(kind, tmp_path, monkeypatch):
    model, file = net(), tmp_path / "file"
    if kind == "moments":
        held = tdecomp.calibrate(model, [X], **QUIET)
    else:
        held = tdecomp.profile(model, X[:1], "svd", effort="quick", **QUIET)
    held.save(file)
    before = file.read_bytes()

    def crash(*args, **_):
        draft = next(arg for arg in args if isinstance(arg, Path))
        draft.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(tensors, "save_file", crash)
    monkeypatch.setattr(Path, "write_text", crash)
    with pytest.raises(OSError, match="disk full"):
        held.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        held.save(tmp_path / "nowhere" / "file")


METHODS = ["svd", "lowrank", "spatial", "tucker2", "cp", "cp-separable"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 2])
def test_layers_initialised_with_zeros_can_learn(method, groups):
    layer = nn.Conv2d(8, 8, 1 if method == "svd" else 3, padding=0, groups=groups)
    nn.init.zeros_(layer.weight)
    x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    for data in (None, [x]):
        chain = tdecomp.decompose(
            nn.Sequential(layer), method, rank=2, data=data, allow_expansion=True, **QUIET
        ).model
        assert torch.equal(chain(x), layer(x))
        optimizer = torch.optim.SGD(chain.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (chain(x) - 1).square().mean().backward()
            optimizer.step()
        assert all(p.any() for p in chain.parameters())
        assert all(p.grad.any() for p in chain.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 8, 3, 3),
        torch.ones(2, 8, 5, 5),
        torch.zeros(2, 8, 5, 5),
        torch.ones(9, 8, 9, 9),
    ],
    ids=["one patch", "constant", "zero", "many constant"],
)
def test_inputs_that_hardly_vary(method, bias, x):
    layer = nn.Conv2d(8, 8, 1 if method == "svd" else 3, bias=bias)
    x = x[..., :1, :1] if method == "svd" and len(x) == 1 else x
    result = tdecomp.decompose(nn.Sequential(layer), method, rank=2, data=[x], **QUIET)
    assert all(p.isfinite().all() for p in result.model.parameters())
    assert (result.model(x) - layer(x)).abs().max() < 1e-3 + 2 * layer(x).abs().max()
    if bias or not x.any():
        assert (result.model(x) - layer(x)).abs().max() < 1e-5
