"""Decomposing whole models, against plain loops over their layers.

The plain loops only find the factors; ours plans, fits, measures errors and builds the new model.
Peak memory is that of a process of its own that makes the model and decomposes it once.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tdecomp
from benchmarks.support.kernel_fits import plain_tucker2, vbmf_by_full_svd
from benchmarks.support.machine import peak_memory
from benchmarks.support.pairs import in_turns, row
from benchmarks.support.torchvision_import import import_torchvision
from tdecomp.decomposers.fit_layer import factorize
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.svd import frobenius_norm
from tdecomp.ranks.grid import rank_at
from tdecomp.runtime.parallel import on_cpu, parallel_map

Kernels = dict[str, Tensor]


def _image() -> Tensor:
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def _layers(model: nn.Module, *kinds: type[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            yield name, weight.detach()


def _quiet(methods: str, rank: Any, *, images: bool = False) -> Callable[[nn.Module], Any]:
    """`decompose` without a bar; with an image where MACs are wanted."""

    def decompose(model: nn.Module) -> tdecomp.Decomposition:
        inputs = _image() if images else None
        return tdecomp.decompose(model, methods, rank=rank, example_inputs=inputs, progress=False)

    return decompose


def tucker2_with_full_svds(model: nn.Module) -> Kernels:
    """VBMF ranks of every convolution by full SVDs, then TensorLy's partial_tucker."""
    found = {}
    for name, weight in _layers(model, nn.Conv2d):
        into, out = (max(1, rank) for rank in vbmf_by_full_svd(weight))
        found[name] = plain_tucker2(weight, (into, out))
    return found


def lowrank_by_thin_svds(model: nn.Module) -> Kernels:
    """Every convolution at a quarter of its full rank."""
    found = {}
    for name, weight in _layers(model, nn.Conv2d):
        matrix = weight.flatten(1)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        rank = max(1, int(0.25 * min(matrix.shape)))
        found[name] = ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(weight.shape)
    return found


def three_rounds_of_thin_svds(model: nn.Module) -> Kernels:
    """One SVD of every layer's matrix, three times."""
    for _ in range(3):
        for _, weight in _layers(model, nn.Conv2d, nn.Linear):
            torch.linalg.svd(weight.flatten(1), full_matrices=False)
    return {}


def _fit_a_quarter(conv: nn.Conv2d) -> None:
    decomposer, spec = get_decomposer("lowrank"), LayerSpec.of(conv)
    factorize(decomposer, conv.weight, spec, rank_at(decomposer.max_rank(spec), 0.25))


def lowrank_fits_in_turn(model: nn.Module) -> Kernels:
    """The fits of `decompose` and nothing else: no plan, no errors, no new model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            _fit_a_quarter(module)
    return {}


def lowrank_fits_side_by_side(model: nn.Module) -> Kernels:
    """The same as `decompose` makes them."""
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    parallel_map(_fit_a_quarter, convs, size=lambda conv: on_cpu(conv.weight))
    return {}


@dataclass(frozen=True)
class Case:
    """A model, what is made of it, the plain loop if there is one, and the bounds."""

    title: str
    model: str
    weights: str
    ours: Callable[[nn.Module], Any]
    plain: Callable[[nn.Module], Kernels] | None
    times_faster: float | None = None
    worse: float | None = None


def _budget(methods: str) -> Callable[[nn.Module], Any]:
    return _quiet(methods, tdecomp.Budget(macs=0.5), images=True)


_VGG, _RESNET = "vgg16", "resnet50"
_HALF_THE_MACS = tdecomp.Ratio(0.5, of="macs")
_TUCKER2 = _quiet("tucker2", "vbmf")
_LOWRANK = _quiet("lowrank", 0.25)
CASES = (
    Case("VGG-16, tucker2 by VBMF", _VGG, "planted", _TUCKER2, tucker2_with_full_svds, 6, 1.01),
    Case("VGG-16, lowrank at 0.25", _VGG, "random", _LOWRANK, lowrank_by_thin_svds, 2, 1.01),
    Case("VGG-16, lowrank at 0.25", _VGG, "planted", _LOWRANK, lowrank_by_thin_svds, 2, 1.01),
    Case("VGG-16, cp at half the MACs", _VGG, "random",
         _quiet("cp", _HALF_THE_MACS, images=True), None),
    Case("ResNet-50, Budget(macs=0.5), dense", _RESNET, "random", _budget("dense"),
         three_rounds_of_thin_svds, 1),
    Case("ResNet-50, Budget(macs=0.5), auto", _RESNET, "random", _budget("auto"),
         three_rounds_of_thin_svds),
    Case("ResNet-50, lowrank, against its fits in turn", _RESNET, "random", _LOWRANK,
         lowrank_fits_in_turn, 1 / 1.1),
    Case("ResNet-50, lowrank, against its fits side by side", _RESNET, "random", _LOWRANK,
         lowrank_fits_side_by_side),
)  # fmt: skip


def build(name: str, weights: str) -> nn.Module:
    """A model of torchvision's with seeded weights, a third of the full rank planted if asked."""
    torch.manual_seed(0)
    model: nn.Module = getattr(import_torchvision().models, name)(weights=None).eval()
    if weights == "planted":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                plant(module)
    return model


def plant(conv: nn.Conv2d) -> None:
    """Add a kernel of a third of the full rank to a layer's weight."""
    matrix = conv.weight.detach().flatten(1)
    rank = max(1, min(matrix.shape) // 3)
    planted = torch.randn(matrix.shape[0], rank) @ torch.randn(rank, matrix.shape[1])
    with torch.no_grad():
        conv.weight.add_(2 * matrix.std() * planted.reshape(conv.weight.shape) / rank**0.5)


def rows(only: str, repeats: int) -> Iterator[list[str]]:
    """One line per case whose title holds `only`."""
    for case in CASES:
        if only in case.title:
            model = build(case.model, case.weights)
            yield measured(case, repeats, model, _peak_in_own_process(case))


def measured(case: Case, repeats: int, model: nn.Module, peak: float) -> list[str]:
    """The line of a case on a model; `peak` is the memory in bytes of decomposing it once."""
    plain = (dict) if case.plain is None else partial(case.plain, model)
    sides = in_turns({"": partial(case.ours, model)}, plain, repeats)[""]
    kernels: Kernels = sides.found_plainly
    report = sides.found.report
    errors = None
    if kernels:
        norms = {name: frobenius_norm(weight) for name, weight in _layers(model, nn.Conv2d)}
        changed = {one.name: one.weight_error for one in report if one.method is not None}
        errors = (
            _total({name: error * norms[name] for name, error in changed.items()}, norms),
            _total({name: _lost(model, name, kernels[name]) for name in changed}, norms),
        )
    cells = row(
        case.title,
        case.weights,
        sides,
        at_least=case.times_faster,
        errors=errors,
        worse=case.worse,
        found=(f"{sum(one.method is not None for one in report)} layers", ""),
        peak=peak,
    )
    if case.plain is None:
        cells[3] = cells[4] = ""
    return cells


def _total(lost: dict[str, float], norms: dict[str, float]) -> float:
    """The relative error of all these layers' weights taken together."""
    whole = sum(norms[name] ** 2 for name in lost)
    return float((sum(value**2 for value in lost.values()) / whole) ** 0.5)


def _lost(model: nn.Module, name: str, found: Tensor) -> float:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    return frobenius_norm(weight.detach() - found)


def _peak_in_own_process(case: Case) -> float:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak, CASES.index(case), torch.get_num_threads()).result()


def _peak(case: int, threads: int) -> float:
    torch.set_num_threads(threads)
    CASES[case].ours(build(CASES[case].model, CASES[case].weights))
    return peak_memory()
