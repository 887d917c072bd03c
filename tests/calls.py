"""Calls of this library on models in the middle of their training, to be cut short or repeated."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import tdecomp
from tdecomp import composer
from tests.unchanged import global_state, state_of

METHODS = ["tucker2", "svd", "lowrank"]
BUDGET = {"rank": tdecomp.Budget(macs=0.6), "example_inputs": torch.ones(1, 3, 6, 6)}
QUIET = {"progress": False}


class Net(nn.Module):
    """Of everything that a pass changes or that can be lost: some."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1)
        )
        self.deeper, self.norm = nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)
        self.first, self.again = nn.Linear(12, 12), nn.Linear(12, 12)
        self.again.weight = self.first.weight
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(12, 16)
        self.out = nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls.add_(1)
        y = self.norm(self.deeper(self.features(x))).relu().mean((2, 3))
        y = self.drop(self.again(self.first(y).relu()).relu())
        return self.out(self.head(y).relu()) + 0 * torch.rand(())


@dataclass
class Subject:
    """A model in the middle of its training, and what it is used with."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    batches: list[Any]
    original: nn.Module | None = None  # that the model was made of
    result: tdecomp.Decomposition | None = None  # that holds the model

    def state(self):
        """What must not change; then what may change as a whole."""
        original = {} if self.original is None else state_of(self.original)
        kept = {**original, **state_of(self.batches), **global_state()}
        return kept, [state_of(thing) for thing in (self.model, *self.optimizers)]


def in_training():
    """A model with hooks, gradients, two optimizers, and modes and parameters of all sorts."""
    model = Net()
    model.features[1].eval()
    model.out.bias.requires_grad_(False)
    return _trained(model)


def decomposed():
    """The same, decomposed before."""
    subject = in_training()
    result = tdecomp.decompose(subject.model, METHODS, rank=3, **QUIET)
    return Subject(**{**vars(_trained(result.model)), "original": subject.model, "result": result})


def wide():
    """Layers so large that they are fitted side by side."""
    model = nn.Sequential(nn.Linear(384, 320), nn.ReLU(), nn.Linear(320, 384))
    return Subject(model, [torch.optim.SGD(model.parameters(), lr=0.1)], [torch.randn(8, 384)])


def transformer():
    """A model with a fast path of torch's own, frozen except for its last layer."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    model.append(nn.Linear(16, 12)).requires_grad_(False)[1].requires_grad_(True)
    return Subject(model.eval(), [], [{"input": torch.randn(4, 5, 16)} for _ in range(2)])


def _trained(model):
    model.register_forward_hook(_nothing)
    model.norm.register_forward_pre_hook(_nothing)
    *most, head, head_bias, last, _ = model.named_parameters()
    optimizers = [
        torch.optim.SGD([p for _, p in most], lr=0.01, momentum=0.9),
        torch.optim.AdamW([head, head_bias, last], lr=0.01),
    ]
    batches = [(torch.randn(8, 3, 6, 6), torch.zeros(8)) for _ in range(2)]
    batches.append((torch.randn(5, 3, 6, 6, requires_grad=True), torch.ones(5)))
    model(batches[0][0]).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return Subject(model, optimizers, batches)


def _nothing(*_):
    """A hook of the user's."""


def calibrate(s, **options):
    tdecomp.calibrate(s.model, s.batches, **QUIET, **options)


def profile(s):
    tdecomp.profile(s.model, BUDGET["example_inputs"], methods="svd", effort="quick", **QUIET)


def plan(s):
    tdecomp.plan(s.model, METHODS, data=s.batches, **BUDGET, **QUIET)


def copy(s):
    loader = torch.utils.data.DataLoader([x.detach() for x, _ in s.batches[:2]], shuffle=True)
    tdecomp.decompose(
        s.model, METHODS, rank=3, data=tdecomp.Data(loader), recover="refit", seed=1,
        forward=lambda model, batch: model(batch[0]), **QUIET,
    )  # fmt: skip


def inplace(s, methods=METHODS, **options):
    tdecomp.decompose(
        s.model, methods, data=s.batches, inplace=True, optimizers=s.optimizers, **QUIET, **options
    )


def compress_to(s):
    quality = tdecomp.Quality(lambda model: model.calls.add_(1).item(), drop=1e9, evaluations=4)
    tdecomp.compress_to(
        s.model, quality, "svd", of="params", include="head", data=s.batches, **QUIET
    )


def compose(s):
    composer.apply_factorization(s.model, min_channels=8, min_features=8, optimizers=s.optimizers)


def reduce_ranks(s):
    tdecomp.reduce_ranks(
        s.result, rank=2, data=s.batches, inplace=True, optimizers=s.optimizers, **QUIET
    )


def refit(s):
    tdecomp.refit(s.model, s.original, s.batches, inplace=True, **QUIET)


def recalibrate(s):
    tdecomp.recalibrate_batchnorm(s.model, s.batches, original=s.original, inplace=True, **QUIET)


def distill(s):
    tdecomp.distill(s.model, s.original, s.batches, steps=3, inplace=True, **QUIET)


def reconstruct(s):
    tdecomp.reconstruct(s.model, s.original, s.batches, epochs=2, inplace=True, **QUIET)


@dataclass(frozen=True)
class Case:
    """A call and what it is made with; a training takes some interrupts in."""

    call: Callable[[Subject], None]
    build: Callable[[], Subject] = in_training
    trains: bool = False
    threads: int = 1

    def subject(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build()

    @contextmanager
    def with_threads(self):
        """Inside, torch has as many threads as the case wants."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        yield
        torch.set_num_threads(before)


CASES = {
    "calibrate": Case(calibrate),
    "calibrate in groups": Case(partial(calibrate, max_memory=50_000, seed=3)),
    "profile": Case(profile),
    "plan": Case(plan),
    "decompose a copy": Case(copy),
    "decompose": Case(partial(inplace, **BUDGET)),
    "decompose, refit": Case(partial(inplace, recover=["refit", "recalibrate_batchnorm"], rank=3)),
    "decompose, distill": Case(
        partial(inplace, recover=[tdecomp.Distill(steps=3)], rank=3, seed=2), trains=True
    ),
    "decompose side by side": Case(partial(inplace, methods="svd", rank=4), wide, threads=2),
    "decompose a transformer": Case(
        partial(inplace, methods="svd", rank=4, recover="refit"), transformer
    ),
    "compress_to": Case(compress_to),
    "composer": Case(compose),
    "reduce_ranks": Case(reduce_ranks, decomposed),
    "refit": Case(refit, decomposed),
    "reconstruct": Case(reconstruct, decomposed),
    "recalibrate_batchnorm": Case(recalibrate, decomposed),
    "distill": Case(distill, decomposed, trains=True),
}
