"""A network of no known family, with a table of its own. Run: python client/examples/own_network.py

It has attention with rotary positions and gated neurons; ``own_network.json`` says which tensor connects which.
Check that it is right, from this folder: nowcast spec check own_network.json --model own_network:tiny
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from common import TextWindows, arguments
from nowcast_client import attach
from nowcast_client.loggers import describe
from torch import Tensor, nn
from torch.utils.data import DataLoader

TABLE = Path(__file__).with_suffix(".json")


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


def main() -> None:
    """Train it on bytes."""
    options = arguments(__doc__, steps=300, period=60)
    torch.manual_seed(0)
    model = Own(tokens=256, width=48, heads=4, hidden=96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    settings = {"period": options.period, "total_steps": options.steps, "wait": options.wait}
    with attach(model, optimizer, options.url, table=TABLE, **settings) as nowcast:
        for batch in DataLoader(TextWindows(64, 8 * options.steps), 8, shuffle=True):
            tokens = batch["input_ids"]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            nowcast.observe(loss)
            optimizer.step()
    logging.info(describe(nowcast.summary()))


if __name__ == "__main__":
    main()
