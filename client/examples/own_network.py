"""A network of nobody's family, for the table in ``own_network.json``: attention with rotary positions, gated neurons.

Check the table, from this folder:  nowcast spec check own_network.json --model own_network:tiny
Train with it:  attach(model, optimizer, spec=derive_spec(model, table="own_network.json"))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a gated feed-forward, each with a norm before it and a way around it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ask, self.key, self.value, self.mix = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (
            part(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.ask, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        y = self.between(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def turned(x: Tensor) -> Tensor:
    """Queries or keys (batch, heads, time, size), pairs of neurons turned by an angle that grows with time."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 0.7 ** torch.arange(half, dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Own(nn.Module):
    """A language model over tokens."""

    def __init__(self, tokens: int = 11, width: int = 12, heads: int = 3, hidden: int = 10, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList([Block(width, heads, hidden) for _ in range(layers)])
        self.last = nn.LayerNorm(width)
        self.scores = nn.Linear(width, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return self.scores(self.last(x))


def tiny() -> tuple[nn.Module, Tensor]:
    """The network, small, and an input for it."""
    return Own(), torch.tensor([[1, 5, 3, 7, 2, 8]])
