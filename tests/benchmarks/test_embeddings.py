"""The benchmark of tables, on a small one."""

import torch

from benchmarks.embeddings import lines_of


def test_counted_rows_lose_less_of_what_is_read():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 16, generator=generator)
    often = 1 / torch.arange(1.0, 301)
    read = [torch.multinomial(often, 160, True, generator=generator).view(8, 20) for _ in range(9)]
    by_weights, by_rows = lines_of("small", weight, read)
    assert by_weights[:2] == ["small", "weights"]
    assert by_weights[2:4] == by_rows[2:4] == ["3", "948"]
    assert float(by_rows[-1]) < float(by_weights[-1])
