"""A chain inside a model goes wherever stock torch layers go, and comes back as it was."""

import copy
import io
import pickle
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from tdecomp.decomposers.assemble import assemble, empty_chain
from tdecomp.decomposers.fit_layer import factorize
from tdecomp.decomposers.registry import get_decomposer, registered
from tdecomp.layers.spec import LayerSpec
from tests.decomposers.oracle import distance

RANKS = {
    "svd": 3,
    "lowrank": 3,
    "spatial": 4,
    "tucker2": (3, 4),
    "cp": 5,
    "cp-separable": 5,
    "split-svd": (2, 3),
    "tt": 3,
}


def features():
    return nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ConvTranspose2d(6, 4, 2, stride=2)


def linear():
    return nn.Conv2d(4, 6, 1), nn.Linear(9, 5)


def fused():
    return nn.Linear(9, 12), nn.Linear(12, 6)


def layers_for(method):
    """Two layers that it takes, with their specs."""
    made = {"svd": linear, "split-svd": fused, "tt": fused}.get(method, features)()
    specs = [LayerSpec.of(layer) for layer in made]
    if method == "split-svd":
        specs = [replace(spec, parts=(spec.out_channels // 2,) * 2) for spec in specs]
    return list(zip(made, specs, strict=True))


def in_a_model(method, layers):
    channels = 4 if method in ("split-svd", "tt") else 6
    return nn.Sequential(layers[0], nn.BatchNorm2d(channels), nn.ReLU(), layers[1]).eval()


@cache
def fitted(method):
    """A model with two chains of this method in it."""
    torch.manual_seed(0)
    decomposer = get_decomposer(method)
    chains = []
    for layer, spec in layers_for(method):
        factorization = factorize(decomposer, layer.weight, spec, RANKS[method])
        chains.append(assemble(layer, decomposer, RANKS[method], factorization))
    return in_a_model(method, chains)


def empty(method):
    """The same structure, made from specs and ranks alone, with NaN for weights."""
    decomposer, rank = get_decomposer(method), RANKS[method]
    chains = [empty_chain(decomposer, spec, rank) for _, spec in layers_for(method)]
    model = in_a_model(method, chains)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


def example(batch=2, seed=1):
    return torch.randn(batch, 4, 8, 9, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=RANKS)
def method(request):
    return request.param


@pytest.fixture
def model(method):
    return fitted(method)


def same_bits(one, other):
    for batch in (1, 3):
        assert torch.equal(one(example(batch)), other(example(batch)))
    assert list(one.state_dict()) == list(other.state_dict())


def test_every_registered_method_of_the_library_has_its_round_trips():
    own = [name for name in registered() if type(get_decomposer(name)).__module__[:7] == "tdecomp"]
    assert set(own) == set(RANKS)


def test_state_dict_fits_a_freshly_built_chain(model, method):
    fresh = empty(method)
    fresh.load_state_dict(model.state_dict())
    same_bits(fresh, model)


def test_saved_state_dict_loads_as_weights_only(model, method):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = empty(method)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    same_bits(fresh, model)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_know_what_they_replaced(model, method, copied):
    other = copied(model)
    same_bits(other, model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    for index in (0, 3):
        assert other[index].method == method
        assert other[index].rank == RANKS[method]
        assert other[index].replaced == model[index].replaced


def test_chain_shows_its_method_and_rank(model, method):
    assert f"method='{method}', rank={RANKS[method]}" in repr(model)


def test_deepcopy_trains_like_the_original(method):
    one, other = copy.deepcopy(fitted(method)).train(), copy.deepcopy(fitted(method)).train()
    for trained in (one, other):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        weights = [p for name, p in trained.named_parameters() if not name.endswith("bias")]
        before = [w.detach().clone() for w in weights]
        for _ in range(2):
            optimizer.zero_grad()
            trained(example(4)).square().mean().backward()
            optimizer.step()
        assert not any(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    same_bits(one.eval(), other.eval())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is deprecated:DeprecationWarning")
def test_jit_trace(model):
    traced = torch.jit.trace(model, example())
    for batch in (1, 3):
        assert distance(traced(example(batch)), model(example(batch))) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_jit_script(model):
    assert distance(torch.jit.script(model)(example()), model(example())) < 1e-6


def test_export(model):
    batch = torch.export.Dim("batch", max=64)
    exported = torch.export.export(model, (example(),), dynamic_shapes=({0: batch},)).module()
    for size in (2, 3):
        assert distance(exported(example(size)), model(example(size))) < 1e-5


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
def test_compile_without_graph_breaks(model):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert distance(compiled(example()), model(example())) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("compiler")
def test_compile_with_inductor(model):
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler here")
    compiled = torch.compile(model, fullgraph=True)
    assert distance(compiled(example()), model(example())) < 1e-5


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_onnx_in_onnxruntime(model, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", max=64)
    torch.onnx.export(model, (example(),), file, dynamic_shapes=({0: batch},), verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    for size in (2, 3):
        (output,) = session.run(None, {entry.name: example(size).numpy()})
        assert distance(torch.from_numpy(output), model(example(size))) < 1e-5
