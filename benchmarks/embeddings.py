"""How long a table takes to decompose, and what counting its rows is worth.

A table of 30,522 × 384, the vocabulary of BERT and the width of a small encoder, at a quarter of
its parameters: of random values, and of values whose singular values fall as the root of their
number. Rows are read as often as words are in texts, by Zipf's law.

    python -m benchmarks.embeddings
"""

import time
from collections.abc import Iterator

import torch
from tabulate import tabulate
from torch import Tensor, nn

import tdecomp

ROWS, COLUMNS, SHARE = 30_522, 384, 0.25
_SAMPLES, _LENGTH = 512, 128


def tables() -> dict[str, Tensor]:
    """Weights (rows, columns) by name."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(ROWS, COLUMNS, generator=generator)
    turn = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator)).Q
    falling = torch.arange(1.0, COLUMNS + 1) ** -0.5
    return {"random": flat, "falling spectrum": flat * falling @ turn}


def texts() -> list[Tensor]:
    """Numbers of rows (batch, length), the first ones far more often than the last."""
    generator = torch.Generator().manual_seed(1)
    often = 1 / torch.arange(1.0, ROWS + 1)
    ids = torch.multinomial(often, _SAMPLES * _LENGTH, True, generator=generator)
    return list(ids.view(-1, 32, _LENGTH))


def lines_of(name: str, weight: Tensor, read: list[Tensor]) -> Iterator[list[str]]:
    """One table's line for each way of fitting it."""
    model = nn.Sequential(nn.Embedding.from_pretrained(weight))
    moments = tdecomp.calibrate(model, read, gradients=False, progress=False)
    ratio = tdecomp.Ratio(SHARE, of="params")
    for given, data in (("weights", None), ("rows as often as read", read)):
        began = time.process_time()
        result = tdecomp.decompose(model, "svd", rank=ratio, data=data, progress=False)
        seconds, row = time.process_time() - began, result.report["0"]
        table, linear = (result.model.get_parameter(f"0.{at}.weight") for at in (0, 1))
        lost = moments["0"].held_error(weight, table @ linear.T)
        assert lost is not None
        errors = (row.weight_error or 0.0, lost.value)
        sizes = (str(row.rank), f"{row.params_after:,}", f"{seconds:.2f}")
        yield [name, given, *sizes, *(f"{error:.3f}" for error in errors)]


def main() -> None:
    """Run `python -m benchmarks.embeddings`."""
    torch.set_num_threads(1)
    read = texts()
    lines = [line for name, weight in tables().items() for line in lines_of(name, weight, read)]
    headers = ["table", "fitted to", "rank", "parameters", "seconds", "weight error", "output lost"]
    print(tabulate(lines, headers, disable_numparse=True))
    print(
        f"\n{ROWS:,} × {COLUMNS} = {ROWS * COLUMNS:,} parameters at {SHARE:.0%}; seconds of one "
        "core, with data those of the passes over them included; output lost: the share of the "
        f"variance of the rows that held-out samples read; torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
