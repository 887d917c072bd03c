import itertools
import json
import os
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import tdecomp
from tdecomp.checkpoint.file import save
from tdecomp.files import tensors as tensor_files
from tdecomp.files.tensors import write_tensors
from tests.checkpoint.networks import METHODS, Net, assert_same, batch, decomposed, net
from tests.unchanged import unchanged


def header_of(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["tdecomp"])


def rewritten(file, *, tensors=None, header=None, metadata=None):
    """The file with its tensors or its header edited in place by a function."""
    with safe_open(file, "pt") as opened:
        held = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
        facts = json.loads(opened.metadata()["tdecomp"])
    for edit, value in ((tensors, held), (header, facts)):
        if edit is not None:
            edit(value)
    target = file.with_name("rewritten.safetensors")
    if metadata is None:
        write_tensors(target, "tdecomp", facts, held)
    else:
        save_file(held, target, metadata=metadata)
    return target


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A saved decomposition that no test changes, and its file."""
    file = tmp_path_factory.mktemp("kept") / "model.safetensors"
    result = decomposed()
    result.save(file)
    return result, file


# -- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_round_trip(file, method, dtype, memory_format):
    result = decomposed(net().to(dtype=dtype).to(memory_format=memory_format), method)
    assert sum(row.method is not None for row in result.report) >= 2
    result.save(file)
    fresh = net(seed=5).to(dtype)
    with unchanged(fresh):
        loaded = tdecomp.load(file, fresh)
    x = batch(dtype).contiguous(memory_format=memory_format)
    assert_same(loaded, result.model, x)


def test_file_decides_the_dtype_and_the_layout(file):
    result = decomposed(net().to(memory_format=torch.channels_last).double())
    result.save(file)
    assert not result.model.stem[0][0].weight.is_contiguous()
    assert_same(tdecomp.load(file, net(seed=5)), result.model, batch(torch.float64))


def test_after_fine_tuning(file):
    result = decomposed()
    model = result.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        logits, other = model(batch())
        (logits.square().sum() + other.square().sum()).backward()
        optimizer.step()
    for key in ("stem.0.1.weight", "head.weight", "stem.1.running_mean"):
        assert not torch.equal(before[key], model.state_dict()[key])
    result.save(file)
    assert_same(tdecomp.load(file, net(seed=5)), model, batch())


def test_loaded_model_trains_as_one(file):
    result = decomposed()
    result.save(file)
    outputs = []
    for model in (result.model, tdecomp.load(file, net(seed=5))):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        model(batch())[0].square().sum().backward()
        optimizer.step()
        outputs.append(model.eval()(batch())[0])
    assert torch.equal(*outputs)


def test_shared_tensors_are_stored_once_and_stay_shared(kept):
    result, file = kept
    with safe_open(file, "pt") as opened:
        stored = set(opened.keys())
    assert {"head.weight", "embed.weight"} & stored == {"embed.weight"}
    assert not any(key.startswith("again.") for key in stored)
    loaded = tdecomp.load(file, net(seed=5))
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.again is loaded.twice
    assert isinstance(loaded.twice, tdecomp.Chain)
    assert_same(loaded, result.model)


class Views(nn.Module):
    """Buffers that see one storage, or none, or are not laid out like a contiguous tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("whole", torch.arange(10.0))
        self.register_buffer("part", self.whole[2:6])
        self.register_buffer("reshaped", self.whole.view(2, 5))
        self.register_buffer("every_other", self.whole[::2])
        self.register_buffer("expanded", torch.ones(1).expand(5))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("step", torch.tensor(7))
        self.register_buffer("conjugated", torch.tensor([1j]).conj())
        self.register_buffer("negated", torch.tensor([1j]).conj().imag)

    def forward(self, x):
        return self.layer(x)


def test_views_of_one_storage_keep_their_values(file):
    result = tdecomp.decompose(Views(), "svd", rank=4, inplace=True, progress=False)
    result.save(file)
    loaded = tdecomp.load(file, Views())
    for key, value in result.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_conv1d_and_conv3d(file):
    def build():
        return nn.Sequential(
            nn.Conv1d(8, 12, 3),
            nn.ConvTranspose1d(12, 8, 2),
            nn.Unflatten(2, (3, 3, 3)),
            nn.Conv3d(8, 12, 2, padding=1).to(memory_format=torch.channels_last_3d),
        )

    result = tdecomp.decompose(build(), "lowrank", rank=3, allow_expansion=True, progress=False)
    assert all(row.method for row in result.report)
    result.save(file)
    assert_same(tdecomp.load(file, build()), result.model, torch.randn(2, 8, 28))


def test_model_that_is_the_layer_itself(file):
    result = tdecomp.decompose(nn.Linear(16, 12), "svd", rank=3, progress=False)
    result.save(file)
    loaded = tdecomp.load(file, nn.Linear(16, 12))
    assert isinstance(loaded, tdecomp.Chain)
    assert_same(loaded, result.model, torch.randn(3, 16))


def test_model_with_nothing_decomposed(file):
    result = tdecomp.decompose(net(), "svd", rank=4, where=tdecomp.at_least(999, 999),
                               progress=False)  # fmt: skip
    assert all(row.method is None for row in result.report)
    result.save(file)
    assert_same(tdecomp.load(file, net(seed=5)), result.model, batch())


def test_in_place_result(file):
    model = net()
    result = decomposed(model, inplace=True)
    assert result.model is model
    result.save(file)
    assert_same(tdecomp.load(file, net(seed=5)), model, batch())


def test_training_mode_is_the_given_models(kept):
    _, file = kept
    for training in (True, False):
        loaded = tdecomp.load(file, net().train(training))
        assert {module.training for module in loaded.modules()} == {training}


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_stay_frozen(file, frozen):
    def build(seed):
        model = net(seed)
        for name in frozen:
            model.stem[0].get_parameter(name).requires_grad_(False)
            model.stem[1].get_parameter(name).requires_grad_(False)
        return model

    result = decomposed(build(0))
    assert result.report["stem.0"].method == "lowrank"
    result.save(file)
    assert_same(tdecomp.load(file, build(5)), result.model, batch())


def test_meta_model_gets_values(kept):
    result, file = kept
    with torch.device("meta"):
        fresh = Net()
    fresh.eval()
    before = {id(module) for module in fresh.modules()}
    loaded = tdecomp.load(file, fresh)
    assert {id(module) for module in fresh.modules()} == before
    assert {t.device.type for t in loaded.state_dict().values()} == {"cpu"}
    assert_same(loaded, result.model, batch())
    assert {p.device.type for p in fresh.parameters()} == {"meta"}


class Unsaved(nn.Module):
    """Buffers that no state dict holds, one of them under two names."""

    def __init__(self, offset=1.0):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("offset", torch.full((16,), offset), persistent=False)
        self.register_buffer("again", self.offset, persistent=False)

    def forward(self, x):
        return self.layer(x) + self.offset


def unsaved(device, **options):
    with torch.device(device):
        return Unsaved(**options)


def test_meta_model_gets_buffers_that_are_not_in_the_state_dict(file):
    result = tdecomp.decompose(unsaved("cpu", offset=2.0), "svd", rank=4, progress=False)
    result.save(file)
    loaded = tdecomp.load(file, unsaved("meta"))
    assert torch.equal(loaded.offset, result.model.offset)
    assert loaded.again is loaded.offset
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), result.model(x))
    assert loaded.state_dict().keys() == result.model.state_dict().keys()
    # Where the model has them, they are its own.
    assert torch.equal(tdecomp.load(file, unsaved("cpu")).offset, torch.ones(16))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_buffer_that_is_in_the_state_dict_by_another_name_is_the_same_again(file, device):
    def model(device, value):
        made = unsaved(device)
        with torch.device(device):
            made.layer.register_buffer("kept", torch.full((2,), value))
        made.register_buffer("same", made.layer.kept, persistent=False)
        return made

    tdecomp.decompose(model("cpu", 3.0), "svd", rank=4, progress=False).save(file)
    loaded = tdecomp.load(file, model(device, 1.0))
    assert loaded.same is loaded.layer.kept
    assert torch.equal(loaded.same, torch.full((2,), 3.0))


def test_meta_model_with_a_buffer_that_the_file_lacks_is_refused_with_the_remedy(file):
    tdecomp.decompose(unsaved("cpu"), "svd", rank=4, progress=False).save(file)

    def drop(header):
        del header["buffers"]

    def take_out(tensors):
        del tensors["offset"], tensors["again"]

    older = rewritten(file, header=drop, tensors=take_out)
    refused(older, unsaved("meta"), "no values for offset, again", "include_buffers=False")
    assert torch.equal(tdecomp.load(older, unsaved("cpu")).offset, torch.ones(16))


def test_meta_model_with_a_buffer_of_another_shape_is_refused(file):
    tdecomp.decompose(unsaved("cpu"), "svd", rank=4, progress=False).save(file)
    fresh = unsaved("meta")
    fresh.offset = fresh.again = torch.ones(3, device="meta")
    refused(file, fresh, "'offset' is of another shape", "got (16,), expected (3,)")


def test_buffer_that_the_header_names_and_the_file_lacks(file):
    tdecomp.decompose(unsaved("cpu"), "svd", rank=4, progress=False).save(file)
    refused(
        rewritten(file, tensors=lambda tensors: tensors.pop("offset")),
        unsaved("cpu"),
        "buffers are missing: offset",
    )


def test_loading_fits_nothing(kept, monkeypatch):
    result, file = kept

    def never(*_args, **_options):
        raise AssertionError("fitted on load")

    for owner, name in (
        (tdecomp.SVD, "fit_to"),
        (tdecomp.SVD, "fit"),
        (tdecomp.LowRank, "fit"),
        (torch.linalg, "svd"),
        (torch.linalg, "eigh"),
    ):
        monkeypatch.setattr(owner, name, never)
    assert_same(tdecomp.load(file, net(seed=5)), result.model)


def test_loading_unpickles_nothing(kept, monkeypatch):
    result, file = kept

    def never(*_args, **_options):
        raise AssertionError("unpickled on load")

    fresh = net(seed=5)
    for owner, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(owner, name, never)
    assert_same(tdecomp.load(file, fresh), result.model)


def test_loaded_weights_do_not_depend_on_the_file(file):
    result = decomposed()
    result.save(file)
    loaded = tdecomp.load(file, net(seed=5))
    with file.open("r+b") as opened:  # in place, as cp and rsync --inplace write
        opened.seek(-4096, os.SEEK_END)
        opened.write(b"\0" * 4096)
    assert_same(loaded, result.model)


def test_changing_the_loaded_weights_leaves_the_file(file):
    result = decomposed()
    result.save(file)
    raw = file.read_bytes()
    loaded = tdecomp.load(file, net(seed=5))
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert file.read_bytes() == raw


# -- what the file holds ------------------------------------------------------------------------


def test_file_is_plain_safetensors(kept):
    result, file = kept
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    facts = json.loads(header.pop("__metadata__")["tdecomp"])
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert ends[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
    assert 8 + length + ends[-1][1] == len(raw)
    assert header.keys() | facts["shared"].keys() == result.model.state_dict().keys()


def test_metadata_has_plan_and_version(kept):
    result, file = kept
    header = header_of(file)
    assert header["version"] == tdecomp.__version__
    assert header["format"] == 2
    plan = tdecomp.Plan.from_json(json.dumps(header["plan"]))
    assert plan.to_dict() == result.plan.to_dict()
    assert [(r.name, r.method, r.rank) for r in plan] == [
        (r.name, r.method, r.rank) for r in result.report
    ]


def test_options_of_the_methods_are_kept(file):
    method = tdecomp.CP(n_iter_max=3, tol=1e-3, l2_reg=1e-2, random_state=7)
    result = tdecomp.decompose(net(), method, rank=6, allow_expansion=True, progress=False)
    result.save(file)
    plan = tdecomp.Plan.from_json(json.dumps(header_of(file)["plan"]))
    assert plan.decomposers == {"cp": method}
    assert_same(tdecomp.load(file, net(seed=5)), result.model, batch())


@dataclass(frozen=True)
class Mine(tdecomp.SVD):
    """A user's own method."""

    name: ClassVar[str] = "mine"
    sharpness: float = 1.0


@pytest.mark.usefixtures("own_methods")
def test_custom_method(file):
    tdecomp.register(Mine)
    result = tdecomp.decompose(
        net(), Mine(sharpness=2.5), rank=3, allow_expansion=True, progress=False
    )
    assert {row.method for row in result.report} == {"mine", None}
    result.save(file)
    options = {"orthogonal": False, "sharpness": 2.5}
    assert header_of(file)["plan"]["methods"] == {"mine": options}
    assert_same(tdecomp.load(file, net(seed=5)), result.model, batch())


def test_method_that_nobody_registered_is_named(file):
    result = tdecomp.decompose(net(), Mine(), rank=3, allow_expansion=True, progress=False)
    result.save(file)
    with pytest.raises(ValueError, match=r"unknown method 'mine'.*tdecomp\.register"):
        tdecomp.load(file, net(seed=5))


# -- files that do not fit ----------------------------------------------------------------------


def refused(file, model, *words, error=ValueError):
    with unchanged(model), pytest.raises(error) as caught:
        tdecomp.load(file, model)
    for word in words:
        assert word in str(caught.value)


def test_no_such_file(tmp_path):
    refused(tmp_path / "none", net(), str(tmp_path / "none"), error=FileNotFoundError)


def test_folder(tmp_path):
    refused(tmp_path, net(), str(tmp_path), error=(ValueError, OSError))


@pytest.mark.parametrize("content", [b"", b"{}", b"not a safetensors file at all" * 40])
def test_something_else(file, content):
    file.write_bytes(content)
    refused(file, net(), str(file), "damaged or no safetensors file")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_truncated(kept, file, share):
    raw = kept[1].read_bytes()
    file.write_bytes(raw[: int(share * len(raw))])
    refused(file, net(), str(file), "damaged")


@pytest.mark.parametrize("cut", [1, 7, 8, 9])
def test_truncated_by_a_few_bytes_or_to_a_few(kept, file, cut):
    raw = kept[1].read_bytes()
    for part in (raw[:cut], raw[:-cut]):
        file.write_bytes(part)
        refused(file, net(), str(file), "damaged")


@pytest.mark.parametrize(
    "metadata", [{}, {"format": "pt"}, {"other": "tool"}], ids=["none", "pt", "other"]
)
def test_weights_that_somebody_else_saved(kept, metadata):
    refused(rewritten(kept[1], metadata=metadata), net(), "metadata has no decomposition")


@pytest.mark.parametrize(
    "text", ["", "{junk", "[]", "null", "3", '"text"', "{}", '{"format": "x"}', '{"format": null}']
)
def test_junk_in_the_metadata(kept, text):
    file = rewritten(kept[1], metadata={"tdecomp": text})
    refused(file, net(), str(file))


@pytest.mark.parametrize("key", ["format", "plan", "shared", "strides"])
@pytest.mark.parametrize("value", ["absent", None, 7, "text", [1]])
def test_junk_in_the_header(kept, key, value):
    def edit(header):
        header[key] = value
        if value == "absent":
            del header[key]

    file = rewritten(kept[1], header=edit)
    refused(file, net(), str(file))


@pytest.mark.parametrize("strides", [[1, 2], [0, 0, 0, 0], [-1, 1, 1, 1], [10**14, 1, 1, 1]])
def test_junk_strides(kept, strides):
    name = "stem.0.0.weight"

    def edit(header):
        header["strides"][name] = strides

    refused(rewritten(kept[1], header=edit), net(), name)


def test_newer_format(kept):
    def edit(header):
        header.update(format=3, version="9.8.7", plan={"of another": "kind"})

    file = rewritten(kept[1], header=edit)
    refused(file, net(), str(file), "format 3", "9.8.7", "update")


def test_newer_format_of_which_nothing_is_known(kept):
    file = rewritten(kept[1], metadata={"tdecomp": '{"format": 3, "anything": "else"}'})
    refused(file, net(), str(file), "format 3", "update")


def test_missing_tensors(kept):
    gone = ["stem.0.0.weight", "up.1.bias"]

    def edit(tensors):
        for name in gone:
            del tensors[name]

    refused(rewritten(kept[1], tensors=edit), net(), "missing", *gone)


def test_extra_tensors(kept):
    def edit(tensors):
        tensors.update({"neither": torch.ones(2), "nor.this": torch.ones(3)})

    refused(rewritten(kept[1], tensors=edit), net(), "unexpected", "neither", "nor.this")


def test_tensors_of_another_shape(kept):
    def edit(tensors):
        tensors["stem.0.0.weight"] = torch.ones(2, 7)
        tensors["scale"] = torch.ones(4)

    refused(
        rewritten(kept[1], tensors=edit),
        net(),
        "another shape",
        "stem.0.0.weight (got (2, 7), expected (",
        "scale (got (4,), expected ())",
    )


def test_missing_and_extra_are_named_together(kept):
    def edit(tensors):
        tensors["renamed"] = tensors.pop("stem.1.running_var")

    refused(rewritten(kept[1], tensors=edit), net(), "missing: stem.1.running_var",
            "unexpected: renamed")  # fmt: skip


def test_tensor_of_another_kind(kept):
    def edit(tensors):
        tensors["stem.0.0.weight"] = tensors["stem.0.0.weight"].to(torch.int64)

    refused(rewritten(kept[1], tensors=edit), net(), "stem.0.0.weight")


def test_shared_name_whose_tensor_is_missing(kept):
    def edit(header):
        header["shared"]["head.weight"] = "nowhere"

    refused(rewritten(kept[1], header=edit), net(), "head.weight", "nowhere")


def test_shared_name_of_another_shape(kept):
    def edit(header):
        header["shared"]["head.weight"] = "stem.0.0.weight"

    refused(rewritten(kept[1], header=edit), net(), "head.weight")


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), ["layer '", "the architecture"]),
        (lambda: nn.Sequential(net()), ["layer '", "the architecture"]),
        (lambda: net(width=24), ["stem.0", "3→16", "3→24"]),
        (nn.ReLU, ["no Linear or convolution"]),
    ],
    ids=["another", "one level down", "wider", "no layers"],
)
def test_another_architecture(kept, build, words):
    refused(kept[1], build(), *words)


def test_another_architecture_around_the_same_layers(kept):
    model = net()
    model.extra = nn.LayerNorm(12)
    del model.scale
    refused(kept[1], model, "missing", "extra.bias, extra.weight", "unexpected: scale")


def test_decomposed_model_is_refused(kept):
    result, file = kept
    refused(file, result.model, "layer '", "model of the architecture")


def test_wrapped_model_is_refused(kept):
    refused(kept[1], nn.DataParallel(net()), "DataParallel", "inner")


def test_plan_in_the_file_is_checked(kept):
    def edit(header):
        (row,) = (row for row in header["plan"]["rows"] if row["name"] == "stem.0")
        row["rank"] = 10**6

    refused(rewritten(kept[1], header=edit), net(), "stem.0", "largest useful rank")


# -- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("old", [b"what was there", None], ids=["old file", "no old file"])
def test_crash_while_writing_leaves_the_old_file(file, monkeypatch, error, old):
    def crash(_tensors, target, **_options):
        Path(target).write_bytes(b"half of it")
        raise error

    if old is not None:
        file.write_bytes(old)
    result = decomposed()
    monkeypatch.setattr(tensor_files, "save_file", crash)
    with pytest.raises(type(error)):
        result.save(file)
    assert [p.name for p in file.parent.iterdir()] == ([] if old is None else [file.name])
    assert old is None or file.read_bytes() == old


def test_old_file_is_whole_while_the_new_one_is_written(file, monkeypatch):
    file.write_bytes(b"what was there")
    seen = []

    def look(tensors, target, **options):
        save_file(tensors, target, **options)
        seen.append(file.read_bytes())

    monkeypatch.setattr(tensor_files, "save_file", look)
    result = decomposed()
    result.save(file)
    assert seen == [b"what was there"]
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert_same(tdecomp.load(file, net(seed=5)), result.model)


def test_whoever_reads_the_old_file_goes_on_reading_it(file):
    file.write_bytes(b"what was there")
    with file.open("rb") as opened:
        decomposed().save(file)
        assert opened.read() == b"what was there"


def test_saving_over_the_file_that_was_loaded(file):
    result = decomposed()
    result.save(file)
    loaded = tdecomp.load(file, net(seed=5))
    with torch.no_grad():
        loaded.scale.fill_(3.0)
    save(file, loaded, result.plan)
    assert_same(tdecomp.load(file, net(seed=5)), loaded, batch())


def test_path_may_be_a_string(file):
    result = decomposed()
    result.save(str(file))
    assert_same(tdecomp.load(str(file), net(seed=5)), result.model)


def test_saving_changes_neither_model_nor_strides(file):
    result = decomposed(net().to(memory_format=torch.channels_last))
    with unchanged(result.model):
        result.save(file)


class WithExtraState(nn.Module):
    """Keeps something in its state dict that is not a tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        pass


class Subclass(torch.Tensor):
    """As quantizers have them."""


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to("meta"),
        lambda x: x.to(torch.complex128),
        lambda x: x.as_subclass(Subclass),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "csr", "meta", "complex", "subclass", "quantized"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_that_cannot_be_saved_are_refused_by_name(file, make):
    result = decomposed(net())
    result.model.register_buffer("odd", make(torch.eye(3)))
    with pytest.raises(ValueError, match=r"'odd' of the state dict is a .*only tensors can be"):
        result.save(file)
    assert not file.exists()


def test_lazy_layers_are_refused_by_name(file):
    model = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(16))
    result = tdecomp.decompose(model, "svd", rank=4, progress=False)
    with pytest.raises(ValueError, match=r"save: layer '1' is lazy"):
        result.save(file)


def test_a_link_stays_one_and_a_name_may_be_long(tmp_path):
    result, target = decomposed(net()), tmp_path / ("n" * 250)
    link = tmp_path / "link"
    link.symlink_to(target)
    for name in (target, link):
        result.save(name)
        assert_same(tdecomp.load(name, net()), result.model)
    assert link.is_symlink()
    assert set(tmp_path.iterdir()) == {target, link}


def test_state_that_is_no_tensor_is_refused_by_name(file):
    result = tdecomp.decompose(WithExtraState(), "svd", rank=4, progress=False)
    with pytest.raises(ValueError, match=r"'_extra_state'.*dict.*only tensors"):
        result.save(file)
    assert list(file.parent.iterdir()) == []
