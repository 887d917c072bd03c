import pytest
import torch

import tdecomp
from benchmarks.fused_qkv import layer_rows, model_row
from benchmarks.support.text import Text, counted
from benchmarks.support.transformer import fused_transformer, trained_transformer


@pytest.fixture
def data():
    pieces = torch.randint(1, 128, (48, 32), generator=torch.Generator().manual_seed(0))
    return tdecomp.Data(list(pieces.split(16)), mask=counted, augment=None)


def test_the_fused_transformer_is_the_same_one(data):
    with torch.inference_mode():
        fused, separate = (
            net()(data.batches[0]) for net in (fused_transformer, trained_transformer)
        )
    torch.testing.assert_close(fused, separate)


def test_each_fused_layer_has_a_row_for_each_share(data):
    rows = list(layer_rows(fused_transformer(), data))
    assert len(rows) == 3 * 4
    assert {row["layer"] for row in rows} == {f"blocks.{i}.qkv" for i in range(4)}
    for row in rows:
        assert 0 < row["svd"] < 1
        assert 0 < row["split-svd"] < 1
        assert 4 * row["rank"] >= 2 * sum(row["ranks"]) - 2  # about equal MACs


def test_a_budget_has_a_row(data):
    tokens = torch.cat(data.batches)
    row = model_row(fused_transformer(), Text(tokens, tokens), data, 0.5)
    assert row["svd"] != row["svd or split-svd"] or row["split"] == 0
    assert 0 <= row["split"] <= 4
