import pytest
import torch

from benchmarks.support.text import LENGTH, TOKENS, counted, docstrings
from benchmarks.support.transformer import ByteTransformer, Encoder, nats, trained_transformer
from benchmarks.train_text import train
from benchmarks.transformer import share_of_all


@pytest.fixture(scope="module")
def text():
    return docstrings()


def small():
    torch.manual_seed(0)
    return ByteTransformer(width=16, blocks=1, heads=2).eval()


def test_every_installation_has_text_to_train_on_and_to_judge_by(text):
    for tokens, least in ((text.train, 5000), (text.val, 500)):
        assert len(tokens) >= least
        assert tokens.shape[1] == LENGTH
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < TOKENS
        assert bool((tokens[:, 0] == 0).all())
    pieces = {bytes(row.tolist()) for row in text.val}
    assert len(pieces & {bytes(row.tolist()) for row in text.train}) < 0.1 * len(pieces)


def test_all_but_the_padding_counts():
    tokens = torch.tensor([[0, 5, 6, 0, 0], [0, 7, 8, 9, 10]])
    assert counted(tokens).tolist() == [[True] * 3 + [False] * 2, [True] * 5]


def test_padding_changes_neither_the_loss_nor_the_embedding(text):
    model, tokens = small(), text.val[:8, :24].clone()
    longer = torch.cat([tokens, torch.zeros(8, 9, dtype=torch.long)], dim=1)
    assert torch.allclose(nats(model(longer), longer), nats(model(tokens), tokens), atol=1e-6)
    encoder = Encoder(model)
    assert torch.allclose(encoder(longer), encoder(tokens), atol=1e-6)


def test_a_position_sees_only_those_before_it(text):
    model, tokens = small(), text.val[:4].clone()
    before = model(tokens)
    tokens[:, 20:] = 1
    after = model(tokens)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-6)
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_training_learns_and_is_the_same_for_the_same_seed(text):
    tokens = text.train[:64]
    found = [nats(train(small(), tokens, steps=20, seed=1)(tokens), tokens) for _ in range(2)]
    assert found[0] == found[1] < nats(small()(tokens), tokens) - 0.2


def test_the_transformer_that_ships_has_learned_text(text):
    pieces = text.val[::16]
    with torch.inference_mode():
        assert nats(trained_transformer()(pieces), pieces) < 2.2


def test_a_share_of_the_linear_layers_is_one_of_the_whole_model(text):
    whole = share_of_all(small(), text.val[:1], 0.5)
    assert 0.5 < whole < 0.75
    assert share_of_all(small(), text.val[:1], 1.0) == 1
