"""A small transformer over bytes: as a language model, and as an encoder of texts."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.support.models import read_state_dict
from benchmarks.support.text import LENGTH, TOKENS, Text, counted

TEXT_WEIGHTS = Path(__file__).parents[1] / "weights" / "docstrings_transformer.safetensors"
WIDTH, BLOCKS, HEADS = 128, 4, 4


class Block(nn.Module):
    """Causal self-attention and a perceptron, each after a layer norm, beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (part.unflatten(-1, (self.heads, -1)) for part in self.projected(self.norm1(x)))
        q, k, v = (part.transpose(1, 2) for part in parts)  # (n, heads, length, width / heads)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        more: Tensor = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + more

    def projected(self, y: Tensor) -> tuple[Tensor, ...]:
        """The queries, keys and values (n, length, width)."""
        return self.query(y), self.key(y), self.value(y)


class FusedBlock(Block):
    """The same, with queries, keys and values from one layer."""

    def __init__(self, block: Block) -> None:
        layers = [block.query, block.key, block.value]
        super().__init__(block.query.in_features, block.heads)
        self.load_state_dict(block.state_dict())
        del self.query, self.key, self.value
        self.qkv = nn.Linear(block.query.in_features, sum(layer.out_features for layer in layers))
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([layer.weight for layer in layers]))
            self.qkv.bias.copy_(torch.cat([layer.bias for layer in layers]))

    def projected(self, y: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(y).chunk(3, dim=-1)  # type: ignore[no-any-return]


class ByteTransformer(nn.Module):
    """Predicts the next byte of each position (n, length), from those before it."""

    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS, heads: int = HEADS) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(TOKENS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, TOKENS)

    def encode(self, tokens: Tensor) -> Tensor:
        """The states (n, length, width) that the head reads."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        states: Tensor = self.norm(self.blocks(self.token(tokens) + self.position(places)))
        return states

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encode(tokens))
        return logits


class Encoder(nn.Module):
    """The mean state (n, width) of each text's tokens; padding does not count."""

    def __init__(self, transformer: ByteTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens: Tensor) -> Tensor:
        counts = counted(tokens).float().unsqueeze(-1)  # (n, length, 1)
        total = (self.transformer.encode(tokens) * counts).sum(dim=1)
        return total / counts.sum(dim=1)


def trained_transformer() -> ByteTransformer:
    """The one that ships in benchmarks/weights, in evaluation mode."""
    model = ByteTransformer()
    model.load_state_dict(read_state_dict(TEXT_WEIGHTS))
    return model.eval()


def fused_transformer() -> ByteTransformer:
    """The same one, its queries, keys and values from one layer in each block."""
    model = trained_transformer()
    model.blocks = nn.Sequential(*(FusedBlock(block) for block in model.blocks))  # type: ignore[arg-type]
    return model.eval()


def nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean loss in nats of predicting each token but the first; padding does not count."""
    predicted, following = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    return functional.cross_entropy(predicted, following, ignore_index=0)


@torch.inference_mode()
def outputs(model: nn.Module, tokens: Tensor) -> Tensor:
    """The outputs for all sequences, a few at a time."""
    return torch.cat([model(batch) for batch in tokens.split(64)])


def held_out_nats(model: nn.Module, text: Text) -> float:
    """The loss of a language model on the files that nothing was trained on."""
    return nats(outputs(model, text.val), text.val).item()
