"""One pass over batches: what is seen, how the model is called, and that it is left as it was."""

import contextlib
import copy
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tdecomp
from tdecomp.calibration.accumulator import Accumulator
from tdecomp.calibration.calibrate import calibrate
from tdecomp.calibration.moments import Moments
from tdecomp.calibration.output_gradients import OutputGradients
from tdecomp.calibration.passes import batches_for
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.batches import call_model
from tdecomp.model.opened.scope import opened
from tdecomp.model.sites import find_sites
from tdecomp.runtime.torch_state import exact_passes, no_inference_mode
from tests.decomposers.oracle import distance
from tests.models import MODELS, TwoInputs
from tests.unchanged import unchanged


def whole(batches, **limits):
    """Batches of which nothing is held out."""
    return tdecomp.Data(batches, held_out=0, **limits)


def taken(model, batches, *, max_batches=None, max_memory=None, **options):
    data = whole(batches, max_batches=max_batches, max_memory=max_memory)
    return calibrate(model, data, progress=False, **options)


def images(count=8, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def small(seed=0):
    """Two convolutions and a Linear, which sees fewer samples than it has inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 5, 3, bias=False),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(20, 5),
        )


def check_same(one, other, bound=1e-6):
    """That two moments are of the same inputs, up to rounding."""
    assert one.layers.keys() == other.layers.keys()
    assert one.unreached == other.unreached
    for name in one:
        mine, others = one[name], other[name]
        assert (mine.spec, mine.count, mine.sizes) == (others.spec, others.count, others.sizes)
        for part in ("mean", "matrix", "rows", "gradient"):
            a, b = getattr(mine, part), getattr(others, part)
            assert (a is None) == (b is None), (name, part)
            if a is not None:
                assert distance(a, b) < bound, (name, part)


# What is seen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_sees_what_hooks_see(name, gradients):
    model, batch = MODELS[name].build(), MODELS[name].inputs(6)
    moments = taken(model, [batch], gradients=gradients)
    sums = {}
    with opened(model), exact_passes(), torch.no_grad():
        for site in find_sites(model).values():
            if site.reason is None and not site.spec.transposed:
                own = sums[site.name] = Accumulator(site.spec)
                site.module.register_forward_pre_hook(lambda _, x, own=own: own.add(x[0]))
        call_model(model.eval(), batch)
    assert sums
    assert moments.samples == 6
    assert all((m.gradient is not None) == gradients for m in moments.values())
    without = {name: replace(m, gradient=None) for name, m in moments.items()}
    check_same(Moments(without), Moments({name: own.finish() for name, own in sums.items()}))


def test_layer_called_several_times_sees_every_call():
    model, x = MODELS["twice"].build(), MODELS["twice"].inputs(10)
    moments = taken(model, [x])
    assert list(moments) == ["first"]
    assert moments["first"].count == 30


def test_transposed_and_depthwise_layers_are_not_watched():
    moments = taken(MODELS["cnn"].build(), [MODELS["cnn"].inputs(2)])
    assert list(moments) == ["features.0", "features.3", "features.4", "features.6", "head"]
    assert moments.unreached == ()


def test_layer_that_is_never_reached_is_named():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "spare": nn.Linear(4, 4)})
    moments = taken(model, [torch.ones(3, 4)], forward=lambda m, x: m["used"](x))
    assert list(moments) == ["used"]
    assert moments.unreached == ("spare",)
    assert "1 never reached" in repr(moments)


def test_words_on_the_moments():
    moments = taken(small(), [images(8), images(4)])
    assert repr(moments).startswith("<moments of 3 layers from 12 samples, in 1 of them fewer than")
    assert "0 MiB held" in repr(moments)
    assert moments.peak_bytes > 8 * (27 * 27 + 54 * 54)
    assert len(moments) == 3


# How the model is called -------------------------------------------------------------------------


@dataclass
class Example:
    image: torch.Tensor


@pytest.mark.parametrize(
    "batches",
    [
        images(),
        [images()],
        list(images().split(3)),
        (images(),),
        [(images(), torch.zeros(8))],
        [[images(), "labels"]],
        [{"input": images()}],
        DataLoader(TensorDataset(images(), torch.zeros(8)), batch_size=3),
        DataLoader(TensorDataset(images()), batch_size=8),
    ],
    ids=["tensor", "list", "several", "tuple", "labels", "list-batch", "dict", "loader", "whole"],
)
def test_batches_of_any_kind(batches):
    check_same(
        taken(small(), batches, gradients=False), taken(small(), [images()], gradients=False)
    )


def test_generator_is_enough_for_one_pass():
    whole = taken(small(), [images()], gradients=False)
    check_same(taken(small(), (x for x in images().split(2)), gradients=False), whole)


def test_model_of_several_inputs_by_position_and_by_keyword():
    model, case = MODELS["tuple"].build(), MODELS["tuple"]
    left, right = case.inputs(40)
    by_position = taken(model, [(left, right, "labels")])
    check_same(by_position, taken(model, [{"right": right, "left": left}]))
    called = taken(model, [Example(right)], forward=lambda m, b: m(right=b.image, left=left))
    check_same(by_position, called)


def test_max_batches_leaves_the_others_alone():
    batches = iter(images().split(2))
    moments = taken(small(), batches, max_batches=3)
    assert moments.samples == 6
    assert len(list(batches)) == 1


@pytest.mark.parametrize("model", [MODELS["encoder"], MODELS["attention"]], ids=["encoder", "mha"])
def test_fast_paths_hide_nothing_and_are_on_again_afterwards(model):
    inside = []

    def forward(model, batch):
        inside.append(torch.backends.mha.get_fastpath_enabled())
        return model(batch)

    assert torch.backends.mha.get_fastpath_enabled()
    moments = taken(model.build(), [model.inputs(4)], forward=forward, max_memory=10**6)
    assert moments.unreached == ()
    assert set(inside) == {False}
    assert torch.backends.mha.get_fastpath_enabled()


def test_bar_over_the_batches(capsys):
    calibrate(small(), whole([images()] * 2))
    assert "calibrate: 100%" in capsys.readouterr().err
    taken(small(), [images()])
    assert capsys.readouterr().err == ""


# Left as it was ----------------------------------------------------------------------------------


class Busy(nn.Module):
    """Changes a buffer, draws random numbers, and has a hook, a gradient and a frozen weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        self.register_buffer("calls", torch.zeros(()))
        self.conv.weight.requires_grad_(False)
        self.head.weight.grad = torch.ones(5, 4)
        self.norm.register_forward_hook(lambda *_: None)
        self.head.train()
        self.norm.eval()

    def forward(self, x):
        self.calls += 1
        x = torch.relu_(self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)) + 0.1 * torch.rand(4))


@pytest.mark.parametrize("name", ["busy", "cnn", "encoder", "twice"])
def test_model_is_left_as_it_was(name):
    model = Busy() if name == "busy" else MODELS[name].build()
    batch = images() if name == "busy" else MODELS[name].inputs(4)
    state = torch.get_rng_state()
    with unchanged(model):
        taken(model, [batch, batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def fails_late(model, batch):
    model(batch)
    if batch.shape[0] == 1:
        raise RuntimeError("enough")


@pytest.mark.parametrize(
    "batches, options",
    [
        ([images(), torch.ones(2, 7)], {}),
        ([images(), images(1)], {"forward": fails_late}),
        ([images(200), images(1)], {"forward": fails_late}),
        ([torch.full((2, 3, 8, 8), float("nan"))], {}),
        ([torch.ones(2, 7)], {"max_memory": 10**6}),
        ([images()], {"max_memory": 10}),
        ([], {}),
    ],
    ids=["rejected", "late", "late-without-gradients", "nan", "first", "memory", "none"],
)
def test_model_is_left_as_it_was_by_an_error(batches, options):
    model = Busy()
    state = torch.get_rng_state()
    with unchanged(model), pytest.raises(ValueError, match="calibrate: "):
        taken(model, batches, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()


def test_interrupt_leaves_the_model_as_it_was():
    def interrupted(model, batch):
        model(batch)
        raise KeyboardInterrupt

    model = Busy()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        taken(model, [images()], forward=interrupted)


def test_batches_are_left_alone():
    x = images()
    model = nn.Sequential(nn.ReLU(inplace=False), nn.Conv2d(3, 4, 3))
    taken(model, [x])
    assert torch.equal(x, images())
    assert not x.requires_grad


# Bad input ---------------------------------------------------------------------------------------


def test_rejected_batch_names_what_the_model_said():
    with pytest.raises(ValueError, match=r"calibrate: the model rejected a batch .*\(2, 7\)"):
        taken(small(), [torch.ones(2, 7)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 8])
def test_nan_and_infinity_name_the_layer(value, count):
    class Poisoned(nn.Module):
        def forward(self, x):
            return x * value

    model = nn.Sequential(nn.Conv2d(3, 6, 3), Poisoned(), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 2, 3))
    with pytest.raises(ValueError, match=r"layer '2' .*hold NaN or infinities"):
        taken(model, [images(count)])


def test_model_without_layers_and_data_that_are_none():
    with pytest.raises(ValueError, match="no Linear or convolution"):
        taken(nn.ReLU(), [images()])
    with pytest.raises(TypeError, match="data: expected batches"):
        taken(small(), 3)


# Memory ------------------------------------------------------------------------------------------


def test_layers_in_groups_see_the_same(capsys):
    batches = list(images(12).split(4))
    plain = taken(small(), batches)
    limit = 8 * 54 * 55
    calls = []

    def counted(model, batch):
        calls.append(len(batch))
        return model(batch)

    with unchanged(model := small()):
        grouped = calibrate(model, whole(batches, max_memory=limit), forward=counted)
    assert "calibrate 3/3" in capsys.readouterr().err
    # Once to count patches, then with and without gradients.
    assert len(calls) == 3 + 3 * 2 * 3
    check_same(grouped, plain, bound=1e-12)
    assert grouped.samples == plain.samples == 12
    assert grouped.peak_bytes < plain.peak_bytes
    assert grouped.peak_bytes <= limit


@pytest.mark.parametrize("sizes", [(1, 2000, 3), (2000, 1), (1, 1, 1, 1), (300, 299)])
@pytest.mark.parametrize("limit", [10**5, 10**6, 3 * 10**6, 10**7])
def test_the_limit_is_kept_whatever_batch_comes_first(sizes, limit):
    model = nn.Sequential(nn.Linear(600, 4), nn.Linear(4, 500), nn.Linear(500, 3))
    batches = [torch.randn(size, 600) for size in sizes]
    count = sum(sizes)
    largest = 600 * (8 + (4 * count if count < 600 else 8 * 600))
    if largest > limit:
        with pytest.raises(ValueError, match=f"layer '0' .*alone needs {largest:,} bytes"):
            taken(model, batches, max_memory=limit, gradients=False)
    else:
        assert taken(model, batches, max_memory=limit, gradients=False).peak_bytes <= limit


def test_enough_memory_takes_one_pass(capsys):
    calibrate(small(), whole([images()], max_memory=10**6))
    assert "calibrate: 100%" in capsys.readouterr().err


def test_rows_need_less_than_a_matrix():
    model, x = nn.Linear(1000, 4), torch.ones(10, 1000)
    assert taken(model, [x, x], max_memory=100_000)[""].count == 20
    with pytest.raises(ValueError, match=r"layer '' .*alone needs 8,008,000 bytes"):
        taken(model, [torch.ones(1000, 1000)], max_memory=100_000)
    with pytest.raises(ValueError, match=r"layer '' .*alone needs 168,000 bytes"):
        taken(model.double(), [x.double(), x.double()], max_memory=100_000)


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(ValueError, match=r"layer '2' .*needs 23,760 bytes; .*got 10,000"):
        taken(small(), [images()], max_memory=10_000)


def test_groups_need_batches_that_can_be_gone_through_again():
    with pytest.raises(ValueError, match="max_memory goes through the batches more than once"):
        taken(small(), (x for x in [images()]), max_memory=10**6)


# Merged, saved -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_two_parts_give_the_same_as_the_whole(share):
    # 36 images are more than the 20 inputs of the Linear, the parts of 18 (or 9) are not.
    x = images(36)
    first = int(36 * share)
    parts = [taken(small(), [part], gradients=False) for part in (x[:first], x[first:])]
    merged, whole = parts[0] + parts[1], taken(small(), [x], gradients=False)
    assert parts[0]["5"].few
    assert not merged["5"].few
    assert merged.samples == merged["5"].samples == 36
    check_same(merged, whole)
    few = taken(small(), [x[:5]], gradients=False) + taken(small(), [x[5:12]], gradients=False)
    check_same(few, taken(small(), [x[:12]], gradients=False))
    assert few["5"].rows is not None


def test_merged_gradients_are_weighed_by_samples():
    parts = [taken(small(), [images(n, seed=n)]) for n in (10, 30)]
    merged = (parts[0] + parts[1])["0"].gradient
    assert distance(merged, 0.25 * parts[0]["0"].gradient + 0.75 * parts[1]["0"].gradient) < 1e-12


def test_layer_reached_by_either_part_is_reached():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    a, b = (taken(model, [torch.ones(9, 4)], forward=lambda m, x, k=k: m[k](x)) for k in "ab")
    assert sorted(a + b) == ["a", "b"]
    assert (a + b).unreached == ("c",)


def test_moments_of_other_layers_cannot_be_merged():
    one, other = taken(nn.Linear(4, 3), torch.ones(9, 4)), taken(nn.Linear(4, 2), torch.ones(9, 4))
    with pytest.raises(
        ValueError, match=r"layer '': moments of Linear\(4→3\) and of Linear\(4→2\)"
    ):
        one + other
    with pytest.raises(TypeError):
        one + 3


def test_saved_moments_come_back(tmp_path):
    model = nn.ModuleDict({"net": small(), "spare": nn.Linear(4, 4)})
    moments = taken(model, [images()], forward=lambda m, x: m["net"](x))
    moments.save(tmp_path / "moments.safetensors")
    loaded = Moments.load(tmp_path / "moments.safetensors")
    check_same(loaded, moments, bound=1e-15)
    assert loaded.unreached == ("spare",)
    assert (loaded.samples, loaded.peak_bytes) == (moments.samples, moments.peak_bytes)
    assert loaded["net.5"].samples == moments.samples
    assert loaded["net.5"].rows.dtype == torch.float32
    assert loaded["net.0"].spec.kernel_size == (3, 3)
    check_same(loaded + moments, moments + loaded, bound=1e-15)


def test_file_that_holds_no_moments(tmp_path):
    file = tmp_path / "other.safetensors"
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"other\.safetensors: damaged or no safetensors file"):
        Moments.load(file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="no moments"):
        Moments.load(file)
    for header in ("{}", "[1]", "nonsense", '{"format": 1, "layers": {"0": {}}}'):
        save_file({"x": torch.zeros(1)}, file, {"tdecomp_moments": header})
        with pytest.raises(ValueError, match=r"other\.safetensors: "):
            Moments.load(file)
    save_file({"x": torch.zeros(1)}, file, {"tdecomp_moments": '{"format": 99}'})
    with pytest.raises(ValueError, match=r"moments format 99, .*this version reads format 2"):
        Moments.load(file)
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("part", ["mean", "matrix"])
def test_damaged_file_names_the_tensor_that_it_lacks(tmp_path, part):
    file = tmp_path / "moments.safetensors"
    moments = taken(small(), [images()])
    object.__setattr__(moments["2"], part, None)
    moments.save(file)
    with pytest.raises(ValueError, match=f"lacks .*'2/{part}"):
        Moments.load(file)


# Gradients ---------------------------------------------------------------------------------------


def jacobian_moments(model, x):
    """``E[JᵀJ]`` of each layer by torch's own Jacobians, one sample at a time."""
    model = copy.deepcopy(model).requires_grad_(False)
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        total = 0.0
        for sample in x:

            def outputs(delta, layer=layer, sample=sample):
                handle = layer.register_forward_hook(lambda _, __, y: y + delta)
                with contextlib.closing(_Handle(handle)):
                    return model(sample[None]).flatten()

            shape = []
            handle = layer.register_forward_hook(
                lambda _, __, y, shape=shape: shape.append(y.shape)
            )
            model(sample[None])
            handle.remove()
            jacobian = torch.autograd.functional.jacobian(outputs, torch.zeros(shape[0]))
            by_position = jacobian.flatten(3).transpose(1, 2) if jacobian.dim() > 3 else jacobian
            rows = by_position.reshape(
                len(jacobian), shape[0][1], -1
            ).double()  # (z, out, positions)
            total = total + torch.einsum("zip,zjp->ij", rows, rows)
        found[name] = total / len(x)
    return found


class _Handle:
    def __init__(self, handle):
        self.close = handle.remove


def tiny():
    """A convolution, something in place behind it, and a Linear."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 4)
        )


@pytest.mark.parametrize("frozen", ["none", "first", "all"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_gradients_are_those_of_the_jacobians(frozen, mode):
    model = tiny()
    if frozen == "all":
        model.requires_grad_(False)
    elif frozen == "first":
        model[0].requires_grad_(False)
    x = torch.randn(24, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    with mode(), unchanged(model):
        # Many draws of the mixture on the same images.
        layers = {name: (model[int(name)], LayerSpec.of(model[int(name)])) for name in "03"}
        slopes = OutputGradients(layers, batches_for("test", [x], progress=False))
        with no_inference_mode():
            slopes.add(model, x.repeat(60, 1, 1, 1), 1440)
        found = slopes.finish()
    expected = jacobian_moments(model, x)
    for name, gradient in expected.items():
        assert distance(found[name], gradient) < 0.1, name
    assert torch.equal(found["3"], found["3"].T)


def test_gradients_are_of_the_first_samples_only():
    calls = []

    def counted(model, batch):
        calls.append(torch.is_grad_enabled())
        return model(batch)

    taken(small(), [images(100)] * 4, forward=counted)
    # Sixteen samples at a time, up to 128.
    assert calls == [False] + [True] * 7 + [False] + [True] * 2 + [False] * 2
    calls.clear()
    taken(small(), [images(16)] * 10, forward=counted)
    assert calls == [False, True] * 8 + [False] * 2
    calls.clear()
    taken(small(), [images(100)] * 2, forward=counted, gradients=False)
    assert calls == [False, False]


class Sequence(nn.Module):
    """Takes one sequence of 40 vectors, each of which acts on all."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x.reshape(40, 6)).cumsum(0)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, "label"), Example], ids=["tensor", "labels", "own"]
)
def test_batch_that_cannot_be_cut_is_taken_whole(wrap):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    forward = (lambda m, b: m(b.image)) if wrap is Example else None
    moments = taken(Sequence(), [wrap(x)], forward=forward)
    assert moments["layer"].count == 40
    assert moments["layer"].gradient is not None


def test_gradients_are_the_same_every_time():
    one, other = taken(small(), [images()]), taken(small(), [images()])
    assert torch.equal(one["0"].gradient, other["0"].gradient)


class OnlyForwards(nn.Module):
    """A model that works but cannot be differentiated."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(20, 6)

    def forward(self, x):
        y = self.layer(x)
        if self.kind == "in place":
            y = torch.sigmoid(y)
            y += 1
        elif self.kind == "numpy":
            y = torch.from_numpy(2 * y.numpy())
        elif self.kind == "inference":
            with torch.inference_mode():
                y = torch.relu_(self.layer(x))
        elif self.kind == "detached":
            y = y.detach()
        elif self.kind == "words":
            y = {"label": "cat", "scores": None}
        return y


@pytest.mark.parametrize("kind", ["in place", "numpy"])
def test_model_that_cannot_be_differentiated_is_calibrated_without_gradients(kind):
    model, x = OnlyForwards(kind), torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="no gradients can be taken"):
        moments = taken(model, [x, x])
    assert moments["layer"].gradient is None
    check_same(moments, taken(model, [x, x], gradients=False))


@pytest.mark.parametrize("kind", ["inference", "detached", "words"])
def test_output_that_no_gradient_reaches(kind):
    moments = taken(OnlyForwards(kind), [torch.ones(50, 20)])
    assert moments["layer"].gradient is None


@pytest.mark.parametrize("where", ["model", "batch", "all"])
def test_inference_tensors_are_taken(where):
    with torch.inference_mode():
        model, x = small(), images()
    with torch.inference_mode(where == "all"), unchanged(model):
        if where == "batch":
            model = small()
        elif where == "model":
            x = images()
        with (
            pytest.warns(UserWarning, match="no gradients")
            if where != "batch"
            else contextlib.nullcontext()
        ):
            moments = taken(model, [x])
    assert (moments["0"].gradient is not None) == (where == "batch")
    check_same(
        Moments({name: replace(m, gradient=None) for name, m in moments.items()}),
        taken(small(), [images()], gradients=False),
    )


def test_autocast_of_the_caller_rounds_no_sums():
    model, x = nn.Linear(20, 6), torch.randn(90, 20, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu"):
        moments = taken(model, [x])
    check_same(
        Moments({"": replace(moments[""], gradient=None)}), taken(model, [x], gradients=False)
    )


# Used by a plan ----------------------------------------------------------------------------------


def test_moments_of_another_model_are_refused():
    moments = taken(small(), [images()])
    other = small()
    other[2] = nn.Conv2d(6, 5, 3, stride=2, bias=False)
    with pytest.raises(ValueError, match=r"layer '2': the moments .*, the model has .*stride=2"):
        tdecomp.plan(other, "lowrank", rank=2, data=moments, progress=False)
    with pytest.raises(ValueError, match="no such layer"):
        tdecomp.plan(nn.Linear(4, 4), "svd", rank=2, data=moments, progress=False)


def test_moments_of_another_input_size_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3))
    moments = taken(model, [images()])
    with pytest.raises(ValueError, match=r"layer '0': .*inputs of size 8×8.*give it 9×7"):
        tdecomp.plan(
            model,
            "lowrank",
            rank=2,
            data=moments,
            example_inputs=torch.ones(1, 3, 9, 7),
            progress=False,
        )
    tdecomp.plan(model, "lowrank", rank=2, data=moments, example_inputs=images(1), progress=False)


def test_moments_are_no_batches():
    moments = taken(small(), [images()])
    with pytest.raises(ValueError, match="refit runs the model on batches, got moments"):
        tdecomp.decompose(
            small(), "lowrank", rank=2, data=moments, recover="refit", allow_expansion=True
        )


def test_options_reach_the_calibration_of_a_plan(capsys):
    model = TwoInputs()
    batch = Example(torch.ones(2, 20))
    calls = []

    def forward(model, example):
        calls.append(1)
        return model(torch.zeros(2, 12), example.image)

    data = whole(iter([batch] * 5), max_batches=2)
    tdecomp.plan(model, "svd", rank=2, data=data, forward=forward, progress=False)
    assert len(calls) == 2
    assert capsys.readouterr().err == ""
    data = tdecomp.Data([batch], max_memory=1)
    with pytest.raises(ValueError, match="alone needs"):
        tdecomp.plan(model, "svd", rank=2, data=data, forward=forward, progress=False)


# Variants ----------------------------------------------------------------------------------------


def mirrored(batch, _):
    return batch.flip(-1)


def test_layers_that_see_few_patches_see_variants_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    plain = calibrate(model, whole(batches), progress=False)
    moments = calibrate(model, whole(batches), augment=mirrored, progress=False)
    # The convolution has 288 patches of 27 entries, the Linear 8 inputs of 144: only it goes on.
    assert (plain["0"].count, moments["0"].count) == (288, 16 * 27)
    assert (plain["3"].count, moments["3"].count) == (8, 4 * 8)
    assert moments.samples == plain.samples == 8
    both = [*batches, *(3 * [x.flip(-1) for x in batches])]
    expected = calibrate(model, whole(both), progress=False)
    torch.testing.assert_close(moments["3"].rows, expected["3"].rows)
    assert torch.equal(moments["3"].gradient, plain["3"].gradient)


def test_batches_that_augment_leaves_alone_are_seen_once():
    model, batches = nn.Linear(12, 2), [torch.randn(4, 12)]
    moments = calibrate(model, whole(batches), augment=tdecomp.flip_and_shift, progress=False)
    assert moments[""].count == 4


def test_variants_need_batches_that_come_again():
    with pytest.raises(ValueError, match="augment goes through the batches more than once"):
        calibrate(nn.Linear(12, 2), iter([torch.randn(4, 12)]), augment=mirrored, progress=False)
