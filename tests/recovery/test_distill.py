"""Label-free fine-tuning: it learns, keeps the best, and leaves all else alone."""

import copy
import itertools

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import distill
from tdecomp.recovery.training import hinted
from tests.recovery.networks import QUIET, convnet, decomposed, images, mlp, vectors, whole
from tests.unchanged import unchanged

SHORT = {"steps": 12, **QUIET}


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("hints", [True, False])
def test_it_lowers_the_error_and_touches_neither_model(hints):
    original, batches = convnet().train(), images()
    model = decomposed(original, "lowrank", rank=2).train()
    random = torch.get_rng_state()
    with unchanged(original, model):
        recovery = distill(model, original, batches, steps=30, hints=hints, **QUIET)
    assert torch.equal(torch.get_rng_state(), random)
    assert recovery.error_after < 0.9 * recovery.error_before
    assert recovery.model is not model
    assert all(m.training for m in recovery.model.modules())
    assert all(p.grad is None for p in recovery.model.parameters())
    assert all(map(torch.equal, recovery.model.buffers(), model.buffers()))
    assert not any(m._forward_hooks for m in recovery.model.modules())
    assert str(recovery).startswith("distill: output error")


def test_the_same_batches_and_the_same_seed_give_the_same_model():
    original, batches = convnet(), images()  # images are varied at random
    model = decomposed(original, "lowrank")

    def trained(data, seed):
        return weights(distill(model, original, data, seed=seed, **SHORT).model)

    assert same(trained(batches, None), trained(batches, None))
    assert not same(trained(batches, None), trained(batches, 1))
    dataset = torch.utils.data.TensorDataset(torch.cat(batches))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    state = torch.get_rng_state()
    first = trained(loader, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert same(first, trained(loader, 1))
    assert not same(first, trained(loader, 2))
    torch.set_rng_state(state)


def test_the_result_is_the_best_of_what_was_seen_never_worse_than_what_was_given():
    original, batches = mlp(), vectors()
    model = decomposed(original)
    recovery = distill(model, original, batches, lr=3.0, hints=False, **SHORT)
    assert recovery.error_after == recovery.error_before
    assert same(weights(recovery.model), weights(model))


@pytest.mark.parametrize("amount", [1e-4, 1e-2])
def test_the_rate_is_lower_where_there_is_less_to_learn(amount):
    original, batches = convnet(), images()
    model, generator = copy.deepcopy(original), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += amount * parameter.std(correction=0) * noise
    recovery = distill(model, original, batches, steps=30, hints=False, **QUIET)
    assert recovery.error_after < 0.2 * recovery.error_before


def blocks(*sizes):
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    "model, names",
    [
        (mlp(), []),  # chains alone are no blocks
        (blocks(16, 16, 16, 16), ["0", "1", "2"]),
        (nn.Sequential(nn.Sequential(blocks(16, 16, 16)), nn.ReLU()), ["0.0.0", "0.0.1"]),
        (blocks(*[16] * 11), ["0", "3", "6", "9"]),
        (nn.Sequential(blocks(16, 16), nn.Linear(16, 4)), ["0.0"]),
    ],
    ids=["flat", "blocks", "nested", "many", "one"],
)
def test_hints_come_from_a_few_blocks(model, names):
    assert hinted(decomposed(model, "svd", rank=2)) == names


class Viewing(nn.Module):
    """What many models do between convolutions and classifier; it takes no other layout."""

    def __init__(self):
        super().__init__()
        self.features, self.classifier = convnet()[:6], nn.Linear(12 * 64, 4)

    def forward(self, x):
        return self.classifier(self.features(x).view(len(x), -1))


def test_models_that_view_their_maps_in_one_layout_only():
    original, batches = Viewing(), images()
    with pytest.raises(RuntimeError, match="view"):
        original(batches[0].contiguous(memory_format=torch.channels_last))
    recovery = distill(decomposed(original, "lowrank"), original, whole(batches), **SHORT)
    assert recovery.error_after < recovery.error_before


class Interrupted:
    """Batches that are interrupted after so many, as by somebody at the keyboard."""

    def __init__(self, batches, after):
        self.batches, self.left = batches, after

    def __iter__(self):
        for batch in itertools.cycle(self.batches):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield batch


def test_rows_that_do_not_count_teach_nothing():
    original = mlp()
    model = decomposed(original)
    x = torch.stack(vectors(8, 40)).flatten(0, 1).reshape(40, 8, 16)
    mask = torch.arange(8).expand(40, 8) < torch.arange(1, 41)[:, None] % 8 + 1
    results = []
    for padding in (0.0, 100.0):
        batch = {"x": torch.where(mask[..., None], x, padding), "mask": mask}
        data = tdecomp.Data([batch] * 3, mask=lambda b: b["mask"])
        results.append(
            distill(model, original, data, forward=lambda m, b: m(b["x"]), lr=1e-3, **SHORT)
        )
    assert results[0].error_after < results[0].error_before
    for a, b in zip(*(weights(found.model) for found in results), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_interrupt_keeps_the_best_so_far(inplace):
    original, batches = mlp(), vectors(4, size=256)
    model = decomposed(original)
    given = weights(model)
    data = Interrupted(batches, 7 + 60)  # two of seven are for the errors
    with unchanged(original):
        recovery = distill(
            model, original, data, steps=80, max_batches=1000, inplace=inplace, **QUIET
        )
    assert recovery.notes == ("interrupted: the best model so far",)
    assert recovery.error_after < recovery.error_before
    assert (recovery.model is model) == inplace
    assert not same(weights(recovery.model), given)
    assert all(p.grad is None for p in recovery.model.parameters())
    at_once = distill(decomposed(original), original, Interrupted(batches, 8), **SHORT)
    assert at_once.error_after == at_once.error_before


def test_frozen_parameters_stay():
    original, batches = mlp(), vectors()
    model = decomposed(original, include="0")
    model[2].requires_grad_(False)
    recovery = distill(model, original, batches, **SHORT)
    assert same(weights(recovery.model[2]), weights(model[2]))
    assert not recovery.model[2].weight.requires_grad
    assert not same(weights(recovery.model[0]), weights(model[0]))
    model.requires_grad_(False)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"no parameter .* requires gradients.*requires_grad_\(Tr"),
    ):
        distill(model, original, batches, inplace=True, **SHORT)


def test_in_place_with_gradients_of_its_own():
    original, batches = mlp(), vectors()
    model = decomposed(original)
    copied = distill(model, original, batches, **SHORT)
    model(batches[0]).sum().backward()
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters]
    assert distill(model, original, batches, inplace=True, **SHORT).model is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
    assert same(weights(model), weights(copied.model))


def test_a_loss_that_is_not_finite():
    original, batches = mlp(), vectors(5)
    model = decomposed(original)
    with (
        unchanged(model, original),
        pytest.raises(ValueError, match=r"the loss is (inf|nan) after .*lower rate than lr=1e\+25"),
    ):
        distill(model, original, batches, lr=1e25, inplace=True, **SHORT)
    late = [*batches, torch.full((4, 16), torch.nan)]
    with (
        unchanged(model, original),
        pytest.raises(
            ValueError, match=r"the loss is nan after 4 steps.*look for NaN in the batch"
        ),
    ):
        distill(model, original, late, inplace=True, **SHORT)
    with pytest.raises(ValueError, match=r"original model's outputs .*NaN.*Look at the batches"):
        distill(model, original, late[-1:], **SHORT)


@pytest.mark.parametrize("steps", [0, -1, True, 1.5, "many", [20]])
def test_steps_that_cannot_be(steps):
    with pytest.raises(ValueError, match="distill: expected steps of at least 1, got"):
        distill(mlp(), mlp(), vectors(), steps=steps)


def test_any_number_of_steps():
    """A warm-up of exactly one step, at ten, had a length of zero."""
    original = mlp()
    data = tdecomp.Data(vectors(1, size=8), held_out=0, augment=None)
    model, seen = decomposed(original), []

    def forward(model, batch):
        if torch.is_grad_enabled():
            seen.append(len(batch))
        return model(batch)

    for steps in range(1, 31):
        seen.clear()
        recovery = distill(
            model, original, data, steps=steps, lr=1e-3, hints=False, forward=forward, **QUIET
        )
        assert len(seen) == steps
        assert recovery.error_after < recovery.error_before


@pytest.mark.parametrize("rank,least,most", [(1, 180, 181), (30, 66, 66)])
def test_by_default_a_smaller_model_is_trained_for_more_steps(rank, least, most):
    original = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = tdecomp.decompose(original, "svd", rank=rank, **QUIET).model
    seen = 0

    def count(_, batch):
        nonlocal seen
        seen += 1
        return original[1](original[0](batch))

    class Counted(nn.Module):
        forward = count

    distill(model, Counted(), [torch.randn(8, 64)], hints=False, **QUIET)
    # A few more for the yardstick, the rate, and to see what a step costs.
    assert least < seen < most + 10


@pytest.mark.parametrize("lr", [0, -1.0, float("nan"), float("inf"), True, "fast"])
def test_rates_that_cannot_be(lr):
    with pytest.raises(ValueError, match="distill: expected a finite rate above 0, got lr="):
        distill(mlp(), mlp(), vectors(), lr=lr)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: (x for x in vectors()), "got generator.*expected a DataLoader or a list"),
        (list, "distill: got no batches"),
        (lambda: [torch.zeros(0, 16)], "got no batches"),
        (lambda: [torch.zeros(4, 5)], "distill: the model rejected a batch"),
        (lambda: tdecomp.calibrate(mlp(), vectors(), **QUIET), "distill runs .*got moments"),
    ],
)
def test_batches_that_cannot_be_used(make, words):
    original = mlp()
    with pytest.raises(ValueError, match=words):
        distill(decomposed(original), original, make(), **SHORT)


def test_another_model_s_outputs():
    original, batches = mlp(), vectors()
    with pytest.raises(ValueError, match=r"\(64, 8\).*\(64, 5\).*expected the original"):
        distill(mlp(), nn.Sequential(*list(original)[:4], nn.Linear(20, 5)), batches, **SHORT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precisions(dtype):
    original, batches = convnet(dtype=dtype), images(dtype=dtype)
    recovery = distill(decomposed(original, "lowrank", 2), original, batches, **SHORT)
    assert recovery.error_after < recovery.error_before
    assert all(p.dtype is dtype for p in recovery.model.parameters())


def test_float16_is_refused_in_words():
    original, batches = convnet(dtype=torch.float16), images(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"float16, .*expected float32 or bfloat16"):
        distill(decomposed(original, "lowrank", 2), original, batches, **SHORT)


def test_one_step_without_gradients_around_it():
    original, batches = mlp(), vectors()
    model = decomposed(original)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            recovery = distill(model, original, batches, steps=1, **QUIET)
        assert recovery.error_after <= recovery.error_before
        assert all(p.requires_grad for p in recovery.model.parameters())


class Counting(nn.Module):
    """Writes its own state in every forward pass, of a size that batches have."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.ones(1))

    def forward(self, x):
        self.calls += 1
        self.register_buffer("last", torch.ones(len(x)))
        return self.net(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_buffers_that_a_forward_pass_writes_stay(inplace):
    model, batches = Counting(), [*vectors(), vectors()[0][:5]]
    result = tdecomp.decompose(
        model,
        "svd",
        rank=4,
        data=batches,
        recover=tdecomp.Distill(steps=10),
        inplace=inplace,
        **QUIET,
    )
    assert int(result.model.calls) == 0
    assert len(result.model.last) == 1


def test_batches_get_no_gradient():
    batches = [batch.clone().requires_grad_() for batch in vectors()]
    tdecomp.decompose(mlp(), "svd", rank=4, data=batches, recover=tdecomp.Distill(steps=2), **QUIET)
    assert all(batch.grad is None for batch in batches)
