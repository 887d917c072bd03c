"""How exact the chains are: full rank against the layer, and CP on kernels planted by rank."""

import itertools

import torch
from tabulate import tabulate
from torch import Tensor, nn

import tdecomp
from tdecomp import Decomposer, LayerSpec
from tdecomp.decomposers.fit_layer import factorize

SEEDS = 10
FULL_RANK = ("svd", "lowrank", "spatial", "tucker2")
PLANTED = {(16, 16, 3, 3): 8, (32, 64, 3, 3): 16, (64, 64, 3, 3): 32, (64, 48, 5, 3): 24}


def layers() -> dict[str, tuple[nn.Module, Tensor]]:
    """Layers of several geometries, each with an input."""
    torch.manual_seed(0)
    return {
        "Linear 256→128": (nn.Linear(256, 128), torch.randn(8, 256)),
        "Conv2d 64→128, 1×1": (nn.Conv2d(64, 128, 1), torch.randn(2, 64, 14, 14)),
        "Conv2d 64→128, 3×3, no bias": (
            nn.Conv2d(64, 128, 3, padding=1, bias=False),
            torch.randn(2, 64, 14, 14),
        ),
        "Conv2d 32→48, 5×3, stride (2, 1), dilation (1, 2)": (
            nn.Conv2d(32, 48, (5, 3), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
            torch.randn(2, 32, 15, 17),
        ),
    }


def full_rank_error(method: str, layer: nn.Module, inputs: Tensor) -> float | None:
    """‖chain(x) − layer(x)‖ / ‖layer(x)‖ at full rank; None where the method cannot take it."""
    full = tdecomp.Ratio(1.0, of="rank")
    result = tdecomp.decompose(layer, method, rank=full, allow_expansion=True, progress=False)
    if result.report[""].method is None:
        return None
    with torch.no_grad():
        expected = layer(inputs)
        return float((result.model(inputs) - expected).norm() / expected.norm())


def planted_errors(
    decomposer: Decomposer, shape: tuple[int, int, int, int], rank: int
) -> list[float]:
    """The relative error on each of ten float64 kernels made of `rank` Gaussian components."""
    out, into, height, width = shape
    layer = nn.Conv2d(into, out, (height, width), dtype=torch.float64)
    separable = isinstance(decomposer, tdecomp.CPSeparable)
    errors = []
    for seed in range(SEEDS):
        draw = torch.Generator().manual_seed(seed)
        modes = (out, into, height, width) if separable else (out, into, height * width)
        factors = [torch.randn(n, rank, generator=draw, dtype=torch.float64) for n in modes]
        equation = "ar,br,cr,dr->abcd" if separable else "ar,br,cr->abc"
        kernel = torch.einsum(equation, *factors).reshape(shape)
        fitted = factorize(decomposer, kernel, LayerSpec.of(layer), rank).to_kernel()
        errors.append(float((fitted - kernel).norm() / kernel.norm()))
    return errors


def main() -> None:
    """Print both tables."""
    rows = []
    for (words, (layer, inputs)), method in itertools.product(layers().items(), FULL_RANK):
        error = full_rank_error(method, layer.eval(), inputs)
        if error is not None:
            rows.append([method, words, f"{error:.1e}"])
    print(tabulate(rows, headers=["method", "layer at full rank", "error"], disable_numparse=True))
    print()
    rows = []
    for decomposer in (tdecomp.CP(), tdecomp.CPSeparable()):
        for shape, rank in PLANTED.items():
            errors = planted_errors(decomposer, shape, rank)
            hits = sum(error < 1e-3 for error in errors)
            size = "×".join(map(str, shape))
            rows.append(
                [decomposer.name, size, str(rank), f"{hits} of {SEEDS}", f"{max(errors):.1e}"]
            )
    headers = ["method", "planted kernel", "rank", "below 1e-3", "worst error"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
