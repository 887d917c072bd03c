"""A short training of one block after the other."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import Reconstruct, reconstruct
from tdecomp.recovery.blocks import blocks_of
from tdecomp.recovery.replaced import replaced_layers
from tests.recovery.networks import QUIET, convnet, decomposed, images, mlp, vectors, whole
from tests.unchanged import unchanged


class Residual(nn.Module):
    """A block with a second input, which is given by name."""

    def __init__(self, width, size=32):
        super().__init__()
        self.into, self.out = nn.Linear(width, size), nn.Linear(size, width)

    def forward(self, x, *, scale):
        return x + scale * self.out(torch.relu(self.into(x)))


class Deep(nn.Module):
    """Residual blocks in a list, a stretch of layers, and a head that runs twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Residual(16), Residual(16)])
        self.stretch = nn.Sequential(*mlp()[:3])
        self.head = nn.Linear(20, 20)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=torch.full((), 0.5))
        return self.head(self.head(self.stretch(x)))


def deep():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Deep().eval()


def names_of_blocks(model, original):
    found = blocks_of(model, original, replaced_layers(model, original, "blocks"))
    assert sum(len(block.chains) for block in found) == len(
        replaced_layers(model, original, "blocks")
    )
    return [(block.name, len(block.modules), len(block.chains)) for block in found]


def test_blocks_are_modules_with_few_chains_and_stretches_of_a_sequential():
    original = deep()
    model = decomposed(original, rank=3)
    assert names_of_blocks(model, original) == [
        ("blocks.0", 1, 2), ("blocks.1", 1, 2), ("stretch", 1, 2), ("head", 1, 1),
    ]  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.ReLU())]
    long = nn.Sequential(nn.Flatten(), *layers)
    found = names_of_blocks(decomposed(long, rank=2), long)
    assert found == [("1", 8, 4), ("9", 4, 2)]
    # A layer that is whole ends a stretch; a module of many layers is no block for one chain.
    some = decomposed(long, rank=2, exclude="3")
    assert names_of_blocks(some, long) == [("1", 2, 1), ("5", 8, 4)]
    nested = nn.Sequential(nn.Sequential(long, nn.Identity()))
    one = decomposed(nested, rank=2, include="0.0.5")
    assert names_of_blocks(one, nested) == [("0.0.5", 2, 1)]


@pytest.mark.parametrize("build, rank", [(mlp, 5), (deep, 8)])
def test_errors_on_new_inputs_fall_where_refit_alone_leaves_them(build, rank):
    original, batches = build(), vectors(8, 128)
    refitted = tdecomp.refit(decomposed(original, rank=rank), original, batches, **QUIET).model
    recovery = reconstruct(refitted, original, batches, epochs=20, **QUIET)
    fresh = torch.randn(2048, 16, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        wanted = original(fresh)
        lost = [(m(fresh) - wanted).square().sum() for m in (refitted, recovery.model)]
    assert lost[1] < 0.9 * lost[0]
    assert recovery.error_after < recovery.error_before
    error = lost[1] / (wanted - wanted.mean(dim=0)).square().sum()
    assert abs(recovery.error_after - error) < 2 * recovery.error_margin
    assert all(after <= before for before, after in recovery.layers.values())


def test_only_parameters_of_the_blocks_that_require_gradients_change():
    original, batches = deep(), vectors()
    model = decomposed(original, rank=5)
    model.blocks[0].requires_grad_(False)
    recovery = reconstruct(model, original, batches, **QUIET)
    assert recovery.notes[:2] == (
        "1 blocks left as they were: called several times",
        "1 blocks left as they were: no parameter requires gradients",
    )
    changed = {
        name
        for (name, p), q in zip(recovery.model.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert changed
    assert all(name.startswith(("blocks.1", "stretch")) for name in changed)
    assert all(p.grad is None for p in recovery.model.parameters())


def test_rows_that_do_not_count_teach_nothing():
    original, x = mlp(), torch.stack(vectors(16, 12)).double()
    original = original.double()
    model = decomposed(original, rank=5)
    mask = torch.arange(12).expand(16, 12) < torch.arange(1, 17)[:, None].clamp_max(12)
    noise = x.masked_fill(~mask[..., None], 0.0) + 9.0 * ~mask[..., None]

    def trained(inputs):
        batches = [{"input": rows} for rows in inputs.split(4)]
        data = tdecomp.Data(
            batches, mask=lambda batch: (batch["input"] != 9.0).any(dim=-1), held_out=0
        )
        return reconstruct(model, original, data, epochs=2, **QUIET).model

    one = trained(noise)
    for name, p in one.named_parameters():
        assert p.isfinite().all(), name
    assert not all(
        torch.equal(p, q) for p, q in zip(one.parameters(), model.parameters(), strict=True)
    )


class Routed(nn.Module):
    """A block that returns a row for each token, too, as a mixture of experts may."""

    def __init__(self):
        super().__init__()
        self.router, self.net = nn.Linear(16, 4), mlp()

    def forward(self, x):
        scores = self.router(x.flatten(0, 1)).softmax(dim=-1)
        return self.net(x) * scores.max(dim=-1).values.view(*x.shape[:2], 1), scores


def test_block_of_which_an_output_has_a_row_for_each_token():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = nn.Sequential(Routed())
    batches = [torch.randn(64, 5, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    model = decomposed(original, rank=3)
    recovery = reconstruct(model, original, whole(batches), epochs=4, **QUIET)
    before, after = recovery.layers["0"]
    assert 0 < after < before


def test_what_cannot_take_turns_stays():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.seen = mlp(), 0.0

        def forward(self, x):
            self.seen = self.seen + float(x.mean())
            return self.net(x + self.seen)

    original = Counting().eval()
    model = decomposed(original, rank=5)
    recovery = reconstruct(model, original, vectors(), **QUIET)
    assert "left as it was: its passes cannot wait for one another" in recovery.notes
    assert all(
        torch.equal(p, q)
        for p, q in zip(recovery.model.parameters(), model.parameters(), strict=True)
    )


def test_a_training_that_helps_nobody_is_taken_back():
    original, batches = convnet(), images()
    model = decomposed(original, rank=3)
    recovery = reconstruct(model, original, batches, lr=1e3, epochs=1, **QUIET)
    assert recovery.error_after == recovery.error_before
    assert all(before == after for before, after in recovery.layers.values())


@pytest.mark.parametrize("inplace", [False, True])
def test_results_are_the_same_each_time(inplace):
    original, batches = convnet(), whole(images())
    model = decomposed(original, rank=3)
    with unchanged(model, original):
        first = reconstruct(model, original, batches, seed=3, **QUIET)
    again = reconstruct(model, original, batches, seed=3, inplace=inplace, **QUIET)
    assert again.error_after == first.error_after < first.error_before


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"epochs": 1.5}, {"lr": 0}, {"lr": float("nan")}, {"lr": True}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="reconstruct: expected"):
        Reconstruct(**options)


@pytest.mark.parametrize("masked", [False, True])
def test_sequences_of_several_lengths(masked):
    original, generator = mlp(), torch.Generator().manual_seed(0)
    batches = [torch.randn(16, length, 16, generator=generator) for length in (3, 5, 9, 4)]
    data = whole(batches)
    if masked:
        data = replace(data, mask=lambda x: torch.arange(x.shape[1]).expand(len(x), -1) < 3)
    recovery = reconstruct(decomposed(original, rank=4), original, data, **QUIET)
    assert recovery.error_after < recovery.error_before


class Scorer(nn.Module):
    """A block with one number for each sample."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.into(x))).squeeze(-1)


def test_a_block_may_give_a_single_number_for_each_sample():
    original = nn.Sequential(Scorer())
    smaller = tdecomp.decompose(original, "svd", rank=4, include="0.into", **QUIET).model
    recovery = reconstruct(smaller, original, vectors(4, 64), **QUIET)
    assert [*recovery.layers] == ["0"]
    assert recovery.error_after <= recovery.error_before
