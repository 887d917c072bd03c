"""The result runs once before it is handed over; layers that it does not run without stay."""

import copy
import itertools

import pytest
import torch
from torch import nn

import tdecomp
from tests.unchanged import unchanged

QUIET = {"progress": False}
X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
each_way = pytest.mark.parametrize("inplace", [True, False], ids=["in place", "copy"])
each_input = pytest.mark.parametrize(
    "inputs",
    [{"example_inputs": X}, {"data": [X]}, {"example_inputs": X, "data": [X]}],
    ids=["example", "data", "both"],
)


class Net(nn.Module):
    """Five layers in a row; `use` is handed the middle one and its input."""

    def __init__(self, use):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
        self.use = use

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = torch.relu(self.use(self, layer, x) if i == 2 else layer(x))
        return x


def insists(_net, layer, x):
    if not isinstance(layer, nn.Linear):
        raise TypeError("no Linear\nof mine")
    return layer(x)


def by_shape(_net, layer, x):
    if next(layer.parameters()).shape != (32, 32):
        raise RuntimeError("another size")
    return layer(x)


def moves(_net, layer, x):
    return layer(x.to(layer.weight.device))


def in_training(net, layer, x):
    return layer(x) + layer.weight.sum() if net.training else layer(x)


def catches(_net, layer, x):
    try:
        return layer(x + layer.bias.mean())
    except Exception:
        return layer(x)


BREAKS = {
    insists: "the model does not run with its chain: TypeError: no Linear",
    by_shape: "the model does not run with its chain: RuntimeError: another size",
    moves: "its weight is read outside its own forward",
    in_training: "its weight is read outside its own forward",
    catches: "its weight is read outside its own forward",
}


@each_way
@each_input
@pytest.mark.parametrize("use", BREAKS, ids=lambda use: use.__name__)
def test_a_layer_that_the_model_needs_stays_and_says_why(use, inputs, inplace):
    torch.manual_seed(0)
    model = Net(use).train()
    result = tdecomp.decompose(model, "svd", rank=4, inplace=inplace, **inputs, **QUIET)
    assert [row.name for row in result.report if row.method is None] == ["layers.2"]
    assert result.report["layers.2"].reason == BREAKS[use]
    assert (result.model is model) == inplace
    assert type(result.model.layers[2]) is nn.Linear
    result.model.train()(X)
    result.model.eval()(X)
    # Its plan is the one that was carried out.
    assert result.plan["layers.2"].reason == BREAKS[use]
    assert result.report.after.params == sum(p.numel() for p in result.model.parameters())


@each_way
def test_a_plan_is_carried_out_without_the_layers_that_have_to_stay(inplace):
    model = Net(insists).eval()
    plan = tdecomp.plan(model, "svd", rank=4)
    result = tdecomp.apply(model, plan, example_inputs=X, inplace=inplace, **QUIET)
    assert plan["layers.2"].method == "svd"
    assert result.report["layers.2"].reason == BREAKS[insists]
    result.model(X)


def test_a_budget_is_kept_by_the_others():
    model = Net(insists).eval()
    budget = tdecomp.Budget(macs=0.5)
    result = tdecomp.decompose(model, "svd", rank=budget, example_inputs=X, **QUIET)
    assert result.report["layers.2"].reason == BREAKS[insists]
    assert 0.45 < result.report.after.macs / result.report.before.macs <= 0.5


def test_all_that_break_are_found():
    class All(Net):
        def forward(self, x):
            for layer in self.layers:
                x = insists(self, layer, x)
            return x

    model = All(None)
    with unchanged(model):
        report = tdecomp.decompose(model, "svd", rank=4, example_inputs=X, **QUIET).report
    assert [row.reason for row in report] == [BREAKS[insists]] * 5


class Counts(nn.Module):
    """Normalises by the batch, which it cannot where there is one sample, and counts its runs."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(32, 32), nn.BatchNorm1d(32)
        self.register_buffer("mean", torch.zeros(32))
        self.runs = [0]

    def forward(self, x):
        self.runs[0] += 1
        self.mean += x.mean(0)
        return self.norm(self.layer(x))

    def __deepcopy__(self, memo):
        twin = Counts()
        memo[id(self)] = twin
        twin.runs = self.runs
        twin.layer = memo.get(id(self.layer), twin.layer)
        return twin


@pytest.mark.parametrize("rows, training", [(1, True), (4, True), (1, False)])
@each_way
def test_it_runs_as_often_as_need_be_and_nothing_is_left_behind(inplace, rows, training):
    model, x = Counts().train(training), X[:rows]
    kept = [model.norm, model.mean, model.runs]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fails = rows == 1 and training  # also without a chain: then it runs in eval mode instead
    result = tdecomp.decompose(
        model, "svd", rank=4, example_inputs=x, data=[x], inplace=inplace, **QUIET
    )
    assert result.report["layer"].method == "svd"
    assert [result.model.norm, result.model.mean, result.model.runs] == kept or not inplace
    passes = 4  # the trace, the data's two parts, and whether a part will do as a batch
    assert model.runs[0] <= passes + 2 or fails
    assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items() if "layer" not in n)
    assert model.training == training


def test_what_cannot_be_reached_stays():
    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            second = self.second
            self.call = lambda x: second(x)

        def forward(self, x):
            return self.call(self.first(x))

    class Partly(Closure):
        def forward(self, x):
            return self.second(super().forward(x))

    for kind, inplace in itertools.product((Closure, Partly), (True, False)):
        for inputs in ({"example_inputs": X}, {"data": [X]}):
            result = tdecomp.decompose(kind(), "svd", rank=4, inplace=inplace, **inputs, **QUIET)
            assert "where it cannot be replaced" in result.report["second"].reason
            assert result.report["first"].method == "svd"


class Kept(Net):
    """Holds the middle layer's weight in a list, and uses or returns it in training."""

    def __init__(self, use):
        super().__init__(use)
        self.kept = [self.layers[2].weight]

    def forward(self, x):
        out = super().forward(x)
        return self.use_kept(out) if self.training else out


@each_way
@each_input
@pytest.mark.parametrize("way", ["used", "returned", "its own forward"])
def test_a_weight_that_the_model_keeps_for_itself_stays(way, inputs, inplace):
    model = Kept(lambda _net, layer, x: layer(x)).train()
    layer = model.layers[2]
    model.use_kept = {
        "used": lambda out: out + model.kept[0].sum(),
        "returned": lambda out: (out, {"penalty": model.layers[2].weight}),
        "its own forward": layer.forward,
    }[way]
    result = tdecomp.decompose(model, "svd", rank=4, inplace=inplace, **inputs, **QUIET)
    assert [row.name for row in result.report if row.method is None] == ["layers.2"]


def by_batch(_net, layer, x):
    return layer(x) + (layer.weight.sum() if len(x) == 5 else 0)


def scales_all(_net, layer, x):
    scaled = {name: 2 * value for name, value in layer.named_parameters()}
    return torch.func.functional_call(layer, scaled, x)


@each_way
@pytest.mark.parametrize("use", [by_batch, scales_all], ids=lambda use: use.__name__)
def test_reads_in_every_batch_count(use, inplace, tmp_path):
    model, data = Net(use).eval(), [X, torch.cat([X, X[:1]])]
    result = tdecomp.decompose(model, "svd", rank=4, data=data, inplace=False, **QUIET)
    assert [row.name for row in result.report if row.method is None] == ["layers.2"]
    assert result.report["layers.2"].reason == "its weight is read outside its own forward"

    moments = tdecomp.calibrate(model, data, **QUIET) + tdecomp.calibrate(model, data[:1], **QUIET)
    moments.save(tmp_path / "moments.safetensors")
    moments = tdecomp.Moments.load(tmp_path / "moments.safetensors")
    plan = tdecomp.plan(model, "svd", rank=4, data=moments, **QUIET)
    assert plan["layers.2"].reason == "its weight is read outside its own forward"

    unaware = tdecomp.plan(model, "svd", rank=4, **QUIET)
    result = tdecomp.apply(model, unaware, data=data, inplace=inplace, **QUIET)
    assert [row.name for row in result.report if row.method is None] == ["layers.2"]


class Average(nn.Module):
    """Moves a copy of itself in training, as a momentum encoder does."""

    def __init__(self, move):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
        self.teacher, self.move = copy.deepcopy(self.student), move

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                for parameter in self.teacher.parameters():
                    self.move(parameter)
        return self.student(x) + self.teacher(x)


MOVES = {
    "in place": lambda p: p.lerp_(p + 1, 0.5),
    "through data": lambda p: setattr(p, "data", p.data + 1),
    "several": lambda p: torch._foreach_add_([p], 1.0),
    "view": lambda p: p.view(-1)[0].fill_(9),
    "out": lambda p: torch.add(p, 1, out=p),
}


@each_way
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_parameters_that_training_moves_are_put_back(move, inplace):
    torch.manual_seed(0)
    model = Average(move).train()
    before, held = copy.deepcopy(model.state_dict()), list(model.parameters())
    places = [parameter.data_ptr() for parameter in held]
    result = tdecomp.decompose(model, "svd", rank=4, example_inputs=X, inplace=inplace, **QUIET)
    after = result.model.state_dict()
    assert result.report["teacher.0"].method == "svd"
    assert all(torch.equal(after[name], v) for name, v in before.items() if name in after)
    assert [parameter.data_ptr() for parameter in held] == places
    # The chains are those that are made where nothing runs.
    alike = tdecomp.decompose(copy.deepcopy(model).eval(), "svd", rank=4, **QUIET).model
    assert inplace or all(map(torch.equal, after.values(), alike.state_dict().values()))
    assert inplace or all(map(torch.equal, model.state_dict().values(), before.values()))


class Ensemble(nn.Module):
    """Runs one block with the weights of two, stacked or in turn."""

    def __init__(self, stacked, device):
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(32, 32)) for _ in range(2)]
        self.values, _ = torch.func.stack_module_state(blocks)
        self.block, self.head, self.stacked = blocks[0].to(device), nn.Linear(32, 32), stacked

    def forward(self, x):
        def run(values):
            return torch.func.functional_call(self.block, values, (x,))

        if self.stacked:
            return self.head(torch.vmap(run)(self.values).mean(0))
        return self.head(run({name: value[0] for name, value in self.values.items()}))


@each_way
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_that_is_called_with_other_weights_stays(device, stacked, inplace):
    inputs = {"data": [X]} if device == "cpu" else {"example_inputs": X}
    model = Ensemble(stacked, device).eval()
    result = tdecomp.decompose(model, "svd", rank=4, inplace=inplace, **inputs, **QUIET)
    assert result.report["block.0"].reason == "it is called with another weight than its own"
    assert result.report["head"].method == "svd"
    result.model(X)


def in_vmap(_net, layer, x):
    return torch.vmap(layer)(x)


@pytest.mark.parametrize("rank", [4, tdecomp.Budget(params=0.8)])
@each_input
def test_a_layer_whose_input_is_not_to_be_seen_stays(inputs, rank):
    report = tdecomp.decompose(Net(in_vmap), "svd", rank=rank, **inputs, **QUIET).report
    assert report["layers.2"].reason == "it is called inside torch.func's vmap or gradients"
    assert any(row.method == "svd" for row in report)


def test_a_layer_that_training_skips_is_decomposed():
    def skips(net, layer, x):
        return x if net.training else layer(x)

    model = Net(skips).train()
    result = tdecomp.decompose(model, "svd", rank=4, example_inputs=X, **QUIET)
    assert all(row.method == "svd" for row in result.report)


def test_a_module_that_copies_itself_keeps_its_layers():
    class Own(nn.Sequential):
        def __deepcopy__(self, memo):
            return Own(nn.Linear(32, 32))

    model = nn.Sequential(Own(nn.Linear(32, 32)), nn.Linear(32, 32))
    report = tdecomp.decompose(model, "svd", rank=4, **QUIET).report
    assert "has a __deepcopy__ of its own; use inplace=True" in report["0.0"].reason
    assert report["1"].method == "svd"
    report = tdecomp.decompose(model, "svd", rank=4, inplace=True, **QUIET).report
    assert report["0.0"].method == "svd"


def test_layers_that_are_found_by_their_type_stay():
    class Picky(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = layer(x) if isinstance(layer, nn.Linear) else x
            return x

    report = tdecomp.decompose(Picky(nn.Linear(32, 32)), "svd", rank=4, data=[X], **QUIET).report
    assert "found by their type" in report["0"].reason


def test_a_layer_that_takes_no_part_is_decomposed_all_the_same():
    model = Net(lambda _net, _layer, x: x)
    for inputs in ({"example_inputs": X}, {"data": [X]}):
        result = tdecomp.decompose(model, "svd", rank=4, **inputs, **QUIET)
        assert all(row.method == "svd" for row in result.report)


def test_an_interrupt_in_the_run_changes_nothing():
    def press(_net, layer, x):
        if isinstance(layer, tdecomp.layers.chain.Chain):
            raise KeyboardInterrupt
        return layer(x)

    model = Net(press)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        tdecomp.decompose(model, "svd", rank=4, example_inputs=X, inplace=True, **QUIET)


def test_where_the_parameters_are_may_be_asked_of_a_parameter():
    """As `self.device` of transformers' models does."""

    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            parameter = next(self.parameters())
            return self.second(self.first(x.to(parameter.device, parameter.dtype)))

    for inputs in ({"example_inputs": X}, {"data": [X]}):
        result = tdecomp.decompose(Moves(), "svd", rank=4, **inputs, **QUIET)
        assert all(row.method == "svd" for row in result.report)
