"""Small networks to train many of: convolutional nets, MLPs, GPT-2, Llama and ViT style transformers.

Parameter names follow the libraries users load such models from, so the families that wire users' models wire these.
Everything here runs under ``torch.func.vmap`` (attention is written out, batch norm has no running statistics unless
asked), on any device.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
from nowcast_proto.spec import ArchitectureSpec, ParameterSpec
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

Kind = Literal["convnet", "mlp", "gpt2", "llama", "vit"]
Init = Literal["torch", "he"]
"""Initial weights: the modules' own, or He's for convolutions (He et al., 2015), which convnets learn faster from."""

_EMBEDDING = re.compile(r"\b(wte|wpe|embed_tokens|pos_embedding|class_token)\b")


class Arch(BaseModel):
    """One architecture, as recipes, tasks and manifests name it.

    Attributes:
        kind: What it is.
        widths: Hidden widths of a convnet or MLP, input to output.
        norm: Batch norm after every convolution.
        channels: Image channels.
        size: Image height and width.
        classes: Outputs of an image network.
        dim: Width of a transformer.
        layers: Blocks of a transformer.
        heads: Attention heads.
        kv_heads: Key and value heads (Llama), ``heads`` when None.
        vocabulary: Token ids of a text network.
        context: Tokens a text network sees at once.
        patch: Patch size of a ViT.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    widths: tuple[int, ...] = ()
    norm: bool = False
    channels: int = 3
    size: int = 16
    classes: int = 10
    dim: int = 0
    layers: int = 0
    heads: int = 1
    kv_heads: int | None = None
    vocabulary: int = 256
    context: int = 64
    patch: int = 3

    @property
    def label(self) -> str:
        """A short name: kind and sizes, e.g. ``convnet-8-16-16-bn`` or ``gpt2-2x24``."""
        if self.widths:
            return "-".join([self.kind, *map(str, self.widths)] + (["bn"] if self.norm else []))
        return f"{self.kind}-{self.layers}x{self.dim}"

    @property
    def is_text(self) -> bool:
        return self.kind in ("gpt2", "llama")

    def build(self, *, running_stats: bool = False) -> nn.Module:
        """A freshly initialised network (from torch's global generator).

        Args:
            running_stats: Give batch norm running statistics, as a user's network has; not under ``vmap``.
        """
        if self.kind == "convnet":
            return ConvNet(self, running_stats=running_stats)
        return {"mlp": MLP, "gpt2": GPT2, "llama": Llama, "vit": ViT}[self.kind](self)

    def spec(self) -> ArchitectureSpec:
        """The spec the neural graph is built from."""
        with torch.device("meta"):
            named = dict(self.build().named_parameters())
        attends = self.kind in ("gpt2", "llama", "vit")
        return ArchitectureSpec(
            family="sequential" if self.kind in ("convnet", "mlp") else self.kind,
            parameters=tuple(ParameterSpec(name=name, shape=tuple(p.shape)) for name, p in named.items()),
            ties={"lm_head.weight": "transformer.wte.weight"} if self.kind == "gpt2" else {},
            num_heads=self.heads if attends else None,
            num_kv_heads=self.kv_heads if self.kind == "llama" else None,
        )


def initialised(model: nn.Module, init: Init) -> nn.Module:
    """The model, its convolutions drawn anew where `init` asks for it."""
    if init == "he":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def hidden_matrices(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that Muon is for: matrices and kernels, without embeddings and the last layer (Jordan et
    al., 2024)."""
    names = [name for name, p in model.named_parameters() if p.dim() >= 2]
    # Modules are declared from input to output: the last matrix is the head, where that is not tied to an embedding.
    head = names[-1:] if not isinstance(model, GPT2) else []
    return frozenset(n for n in names if n not in head and not _EMBEDDING.search(n))


class ConvNet(nn.Module):
    """3 x 3 convolutions, the first with stride 2, then global average pooling and one linear layer."""

    def __init__(self, arch: Arch, *, running_stats: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        fan_in = arch.channels
        for i, width in enumerate(arch.widths):
            stride, padding = (2, 0) if i == 0 else (1, 1)
            layers.append(nn.Conv2d(fan_in, width, 3, stride, padding, bias=not arch.norm))
            if arch.norm:
                layers.append(nn.BatchNorm2d(width, track_running_stats=running_stats))
            layers.append(nn.ReLU())
            fan_in = width
        self.fc = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, arch.classes))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, size, size) -> (batch, classes)."""
        out: Tensor = self.fc(x)
        return out


class MLP(nn.Module):
    """Linear layers with ReLU between."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        fan_in = arch.channels * arch.size**2
        for width in arch.widths:
            layers += [nn.Linear(fan_in, width), nn.ReLU()]
            fan_in = width
        self.fc = nn.Sequential(*layers, nn.Linear(fan_in, arch.classes))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, size, size) -> (batch, classes)."""
        out: Tensor = self.fc(x)
        return out


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool) -> Tensor:
    """Softmax attention. q, k, v: (batch, tokens, heads * head size) -> the same shape."""
    b, t, width = q.shape
    q, k, v = (x.reshape(b, t, heads, width // heads).transpose(1, 2) for x in (q, k, v))  # (b, heads, t, head size)
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    if causal:
        scores = scores + torch.full((t, t), float("-inf"), device=scores.device).triu(1)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, width)


class _Conv1D(nn.Module):
    """GPT-2's linear layer, which stores its weight as (in, out)."""

    def __init__(self, fan_in: int, fan_out: int, deviation: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_in, fan_out) * deviation)
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class _GPT2Attention(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.heads = arch.heads
        self.c_attn = _Conv1D(arch.dim, 3 * arch.dim, 0.02)
        self.c_proj = _Conv1D(arch.dim, arch.dim, 0.02 / math.sqrt(2 * arch.layers))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, -1)
        out: Tensor = self.c_proj(_attention(q, k, v, self.heads, causal=True))
        return out


class _GPT2MLP(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.c_fc = _Conv1D(arch.dim, 4 * arch.dim, 0.02)
        self.c_proj = _Conv1D(4 * arch.dim, arch.dim, 0.02 / math.sqrt(2 * arch.layers))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(gelu(self.c_fc(x), approximate="tanh"))
        return out


class _GPT2Block(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(arch.dim)
        self.attn = _GPT2Attention(arch)
        self.ln_2 = nn.LayerNorm(arch.dim)
        self.mlp = _GPT2MLP(arch)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + self.attn(self.ln_1(x))
        out: Tensor = mixed + self.mlp(self.ln_2(mixed))
        return out


class _GPT2Trunk(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.wte = nn.Embedding(arch.vocabulary, arch.dim)
        self.wpe = nn.Embedding(arch.context, arch.dim)
        self.h = nn.ModuleList(_GPT2Block(arch) for _ in range(arch.layers))
        self.ln_f = nn.LayerNorm(arch.dim)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[-1]]
        for block in self.h:
            x = block(x)
        out: Tensor = self.ln_f(x)
        return out


class GPT2(nn.Module):
    """GPT-2 with the head tied to the token embedding (Radford et al., 2019)."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.transformer = _GPT2Trunk(arch)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, tokens) int64 -> (batch, tokens, vocabulary)."""
        out: Tensor = self.transformer(ids) @ self.transformer.wte.weight.T
        return out


class _RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def _rotate(x: Tensor, heads: int) -> Tensor:
    """Rotary position embedding (Su et al., 2021). x: (batch, tokens, heads * head size)."""
    b, t, width = x.shape
    half = width // heads // 2
    frequency = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(t, device=x.device)[:, None] * frequency  # (tokens, half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # (tokens, 1, half)
    first, second = x.reshape(b, t, heads, 2 * half).split(half, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).reshape(b, t, width)


class _LlamaAttention(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.heads, self.kv_heads = arch.heads, arch.kv_heads or arch.heads
        kv_width = arch.dim // arch.heads * self.kv_heads
        self.q_proj = nn.Linear(arch.dim, arch.dim, bias=False)
        self.k_proj = nn.Linear(arch.dim, kv_width, bias=False)
        self.v_proj = nn.Linear(arch.dim, kv_width, bias=False)
        self.o_proj = nn.Linear(arch.dim, arch.dim, bias=False)

    def _repeat(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        grouped = x.reshape(b, t, self.kv_heads, 1, width // self.kv_heads)
        return grouped.expand(-1, -1, -1, self.heads // self.kv_heads, -1).reshape(b, t, -1)

    def forward(self, x: Tensor) -> Tensor:
        q = _rotate(self.q_proj(x), self.heads)
        k = _rotate(self.k_proj(x), self.kv_heads)
        mixed = _attention(q, self._repeat(k), self._repeat(self.v_proj(x)), self.heads, causal=True)
        out: Tensor = self.o_proj(mixed)
        return out


class _LlamaMLP(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        hidden = arch.dim * 8 // 3 // 2 * 2
        self.gate_proj = nn.Linear(arch.dim, hidden, bias=False)
        self.up_proj = nn.Linear(arch.dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, arch.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _LlamaBlock(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.self_attn = _LlamaAttention(arch)
        self.mlp = _LlamaMLP(arch)
        self.input_layernorm = _RMSNorm(arch.dim)
        self.post_attention_layernorm = _RMSNorm(arch.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _LlamaTrunk(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(arch.vocabulary, arch.dim)
        self.layers = nn.ModuleList(_LlamaBlock(arch) for _ in range(arch.layers))
        self.norm = _RMSNorm(arch.dim)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """Llama: rotary positions, RMS norms, gated MLP, a head of its own (Touvron et al., 2023)."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.model = _LlamaTrunk(arch)
        self.lm_head = nn.Linear(arch.dim, arch.vocabulary, bias=False)
        for name, p in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, tokens) int64 -> (batch, tokens, vocabulary)."""
        out: Tensor = self.lm_head(self.model(ids))
        return out


class _ViTAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        out: Tensor = self.out_proj(_attention(q, k, v, self.heads, causal=False))
        return out


class _ViTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = _ViTAttention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        # Dropout holds no weights; it is there so that the second linear layer has torchvision's index, 3.
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.0), nn.Linear(4 * dim, dim), nn.Dropout(0.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class _ViTEncoder(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        tokens = (arch.size // arch.patch) ** 2 + 1
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens, arch.dim) * 0.02)
        self.layers = nn.ModuleDict({f"encoder_layer_{i}": _ViTBlock(arch.dim, arch.heads) for i in range(arch.layers)})
        self.ln = nn.LayerNorm(arch.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embedding
        for layer in self.layers.values():
            x = layer(x)
        out: Tensor = self.ln(x)
        return out


class ViT(nn.Module):
    """Vision transformer with torchvision's names (Dosovitskiy et al., 2021)."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, arch.dim))
        self.conv_proj = nn.Conv2d(arch.channels, arch.dim, arch.patch, stride=arch.patch)
        self.encoder = _ViTEncoder(arch)
        self.heads = nn.ModuleDict({"head": nn.Linear(arch.dim, arch.classes)})

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, size, size) -> (batch, classes)."""
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)  # (b, patches, dim)
        tokens = torch.cat((self.class_token.expand(len(x), -1, -1), patches), 1)
        out: Tensor = self.heads["head"](self.encoder(tokens)[:, 0])
        return out
