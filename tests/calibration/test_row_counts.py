"""Lookups: data count how often each row is read, and no matrix of rows by rows is formed."""

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.second_moment import SecondMoment

QUIET = {"progress": False}
ROWS = 200


class Text(nn.Module):
    def __init__(self, rows=ROWS):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens, self.head = nn.Embedding(rows, 16), nn.Linear(16, 8)

    def forward(self, ids):
        return self.head(self.tokens(ids)).mean(1)


def batches(count=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    often = 1 / torch.arange(1.0, ROWS + 1) ** 1.5
    return [
        torch.multinomial(often, 48, True, generator=generator).view(8, 6) for _ in range(count)
    ]


def frequencies(data):
    ids = torch.cat([batch.flatten() for batch in data])
    return torch.bincount(ids, minlength=ROWS).double() / len(ids)


def calibrate(data, **options):
    return tdecomp.calibrate(Text(), data, **QUIET, **options)


def one_hot(data):
    return nn.functional.one_hot(torch.cat([b.flatten() for b in data]), ROWS).double()


def test_the_moments_are_the_frequencies():
    data = batches()
    moments = calibrate(data)
    seen = moments["tokens"]
    fitted = 20 * 8 - moments.held_out
    assert (seen.count, moments.samples) == (fitted * 6, fitted)
    assert seen.matrix is seen.rows is None
    assert seen.mean.sum() == pytest.approx(1)
    assert seen.held.rows.shape == (1, len(seen.held.owners))
    assert not seen.few


def test_errors_are_those_of_the_outputs():
    data = batches()
    seen = LayerMoments(LayerSpec.of(Text().tokens), 960, frequencies(data)[None])
    weight = Text().tokens.weight.detach()
    other = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    x = one_hot(data)
    y, gone = x @ weight.double(), x @ (weight - other).double()
    variance = (y - y.mean(0)).square().sum()
    assert seen.output_error(weight, other) == pytest.approx(float(gone.square().sum() / variance))
    assert seen.output_variance(weight) == pytest.approx(float(variance / len(x)))


def test_a_fit_is_the_best_for_the_rows_that_are_read():
    data, model = batches(), Text()
    found = tdecomp.decompose(model, "svd", rank={"tokens": 4}, data=data, **QUIET)
    plain = tdecomp.decompose(model, "svd", rank={"tokens": 4}, **QUIET)
    ids = torch.cat(data).flatten()

    def lost(result):
        missed = result.model.tokens(ids) - model.tokens(ids)
        return float(missed.detach().square().sum())

    # Sums over all samples, a fifth of which no fit has seen.
    assert lost(found) < 0.7 * lost(plain)
    row = found.report["tokens"]
    assert row.weight_error > plain.report["tokens"].weight_error
    assert row.output_error_se > 0
    weights = frequencies(data).sqrt()[:, None] * model.tokens.weight.detach().double()
    best = float(torch.linalg.svdvals(weights)[4:].square().sum()) * len(ids)
    assert best <= lost(found) < 1.05 * best


def test_rows_that_no_data_show_are_decided_by_the_weights():
    weight = torch.zeros(ROWS, 16)
    weight[0, 0], weight[1:, 1] = 3.0, 1.0
    model = Text()
    model.tokens.weight = nn.Parameter(weight)
    zeros = [torch.zeros(8, 6, dtype=torch.long) for _ in range(4)]
    result = tdecomp.decompose(model, "svd", rank={"tokens": 2}, data=zeros, **QUIET)
    chain = result.model.tokens
    torch.testing.assert_close(chain[0].weight @ chain[1].weight.T, weight)


def test_a_mask_leaves_padding_out():
    padding = torch.zeros(8, 2, dtype=torch.long)
    data = [torch.cat([batch, padding], dim=1) for batch in batches()]
    masked = tdecomp.Data(data, mask=lambda _: torch.arange(8).expand(8, 8) < 6)
    seen, bare = calibrate(masked)["tokens"], calibrate(batches())["tokens"]
    torch.testing.assert_close(seen.mean, bare.mean)
    assert seen.count == bare.count


def test_merged_saved_moved(tmp_path):
    one, two = calibrate(batches(6)), calibrate(batches(9, seed=1))
    both = one + two
    counts = [m["tokens"].count * m["tokens"].mean for m in (one, two)]
    torch.testing.assert_close(both["tokens"].count * both["tokens"].mean, sum(counts))
    both.save(tmp_path / "moments.safetensors")
    again = tdecomp.Moments.load(tmp_path / "moments.safetensors")
    assert torch.equal(again["tokens"].mean, both["tokens"].mean)
    assert torch.equal(again["tokens"].held.rows, both["tokens"].held.rows)
    assert again["tokens"].to(torch.device("cpu")).count == both["tokens"].count
    plan = tdecomp.plan(Text(), "svd", rank=tdecomp.Budget(params=0.5), data=again, **QUIET)
    assert plan["tokens"].expected_error < 1


def test_a_large_table_takes_memory_for_its_rows_only():
    model = nn.Sequential(nn.Embedding(300_000, 4), nn.Linear(4, 4))
    moments = tdecomp.calibrate(model, batches(3), **QUIET)
    assert moments.peak_bytes < 3e6
    result = tdecomp.decompose(model, "svd", rank={"0": 2}, data=moments, **QUIET)
    assert result.report["0"].output_error < 1


def test_gradients_weigh_it_beside_other_layers():
    moments = calibrate(batches())
    assert moments["tokens"].gradient.shape == (16, 16)
    result = tdecomp.decompose(
        Text(), "svd", rank=tdecomp.Budget(params=0.6), data=moments, **QUIET
    )
    assert result.report["tokens"].method == "svd"


# The diagonal form of a second moment -------------------------------------------------------------


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.rand(12, generator=generator, dtype=torch.float64)
    return SecondMoment(diagonal=diagonal), SecondMoment(matrix=diagonal.diag()), generator


def test_a_diagonal_moment_is_the_matrix(pair):
    mine, full, generator = pair
    kernel = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    order = torch.randperm(12, generator=generator)
    close = torch.testing.assert_close
    for one, other in (
        (mine, full),
        (mine.shrunk(0.3), full.shrunk(0.3)),
        (mine.normalised(torch.float64), full.normalised(torch.float64)),
        *[[m.reordered(lambda x, dim: x.index_select(dim, order)) for m in (mine, full)]],
    ):
        assert (one.trace, one.fan_in) == (pytest.approx(other.trace), other.fan_in)
        close(one.applied(kernel), other.applied(kernel))
        close(one.between(kernel), other.between(kernel))
        close(one.solved(kernel, 0.1), other.solved(kernel, 0.1))
        assert one.lost(kernel) == pytest.approx(other.lost(kernel))
        for mode in range(3):
            close(one.along((2, 3, 2), mode), other.along((2, 3, 2), mode))


def test_exactly_one_form_is_given():
    with pytest.raises(ValueError, match="got rows and diagonal"):
        SecondMoment(rows=torch.ones(2, 2), diagonal=torch.ones(2))
    with pytest.raises(ValueError, match="got none"):
        SecondMoment()
