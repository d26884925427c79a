"""A small GPT-2 in plain PyTorch, under the names and in the layouts of the published model.

The names are what tells the service how the tensors are wired; nothing else about it is special.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the network.

    Attributes:
        vocab_size: Token ids; 256 for bytes.
        n_positions: Tokens it sees at once.
        n_embd: Width.
        n_layer: Blocks.
        n_head: Attention heads per block.
    """

    vocab_size: int = 256
    n_positions: int = 64
    n_embd: int = 64
    n_layer: int = 2
    n_head: int = 4


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight lies (in, out)."""

    def __init__(self, fan_in: int, fan_out: int, deviation: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_in, fan_out).normal_(std=deviation))
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return x @ self.weight + self.bias


class Attention(nn.Module):
    """Causal self-attention with the query, key and value projections fused."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd, 0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        b, t, width = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.c_attn(x).split(width, dim=2))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)  # (b, heads, t, head size)
        projected: Tensor = self.c_proj(mixed.transpose(1, 2).reshape(b, t, width))
        return projected


class MLP(nn.Module):
    """Two linear layers, four times as wide between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, 4 * config.n_embd)
        self.c_proj = Conv1D(4 * config.n_embd, config.n_embd, 0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        projected: Tensor = self.c_proj(gelu(self.c_fc(x), approximate="tanh"))
        return projected


class Block(nn.Module):
    """Attention and MLP, each on the normalised residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """Embeddings and blocks."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) ids -> (batch, tokens, width)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        out: Tensor = self.ln_f(self.h(self.wte(tokens) + self.wpe(positions)))
        return out


class GPT(nn.Module):
    """The network, with a head tied to the token embedding.

    Args:
        config: Its sizes. Weights are drawn from torch's global generator.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) ids -> (batch, tokens, vocabulary) logits."""
        logits: Tensor = self.lm_head(self.transformer(tokens))
        return logits

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross entropy, in nats per token, of windows of ids (batch, tokens + 1)."""
        logits = self(windows[:, :-1])
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
