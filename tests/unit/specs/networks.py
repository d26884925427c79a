"""Tiny networks of every family, with inputs: as people have them, from transformers or written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Mapping[str, Tensor] | tuple[Tensor, ...]]

TOKENS = {"input_ids": torch.tensor([[1, 5, 3, 7, 2, 8]])}
IMAGE = torch.linspace(-1, 1, 3 * 81, dtype=torch.float64).sin().reshape(1, 3, 9, 9)
SMALL = {"vocab_size": 11, "max_position_embeddings": 8, "num_hidden_layers": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
THREE = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 10}


def _transformers(model: str, config: str, inputs: Mapping[str, Tensor], **settings: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        made = getattr(transformers, config)(**settings)
        made._attn_implementation = "eager"
        return getattr(transformers, model)(made), inputs

    return build


def _decoder(model: str, **more: Any) -> Callable[[], Built]:
    settings = {"hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 10}
    config = more.pop("config", model.replace("ForCausalLM", "Config"))
    return _transformers(model, config, TOKENS, **{**settings, **SMALL, **IDS, "tie_word_embeddings": False, **more})


class NanoBlock(nn.Module):
    """Attention with fused or separate projections, and a feed-forward, in the manner of nanoGPT."""

    def __init__(self, width: int, heads: int, *, fused: bool, rotary: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.n_head = heads
        if fused:
            self.attn.c_attn = nn.Linear(width, 3 * width)
        else:
            for name in ("c_q", "c_k", "c_v"):
                setattr(self.attn, name, nn.Linear(width, width, bias=False))
        self.attn.c_proj = nn.Linear(width, width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.heads, self.fused, self.rotary = heads, fused, rotary
        self.lambdas = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, values: Tensor | None) -> Tensor:
        y, attn = self.ln_1(x), self.attn
        q, k, v = attn.c_attn(y).chunk(3, dim=-1) if self.fused else (attn.c_q(y), attn.c_k(y), attn.c_v(y))
        if values is not None:
            v = v + self.lambdas * values
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        if self.rotary:
            q, k = _turned(q), _turned(k)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attn.c_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 0.7 ** torch.arange(half, dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class Nano(nn.Module):
    """A nanoGPT; in its newer manner with rotary positions and value embeddings."""

    def __init__(self, *, modern: bool, value_layers: tuple[int, ...] = ()) -> None:
        super().__init__()
        width, layers, tokens = 12, 2, 11
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(tokens, width)})
        if not modern:
            self.transformer["wpe"] = nn.Embedding(8, width)
        blocks = [NanoBlock(width, 3, fused=not modern, rotary=modern) for _ in range(layers)]
        self.transformer["h"] = nn.ModuleList(blocks)
        self.transformer["ln_f"] = nn.LayerNorm(width)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(tokens, width) for i in value_layers})
        self.lm_head = nn.Linear(width, tokens, bias=False)
        if not modern:
            self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens)
        if "wpe" in self.transformer:
            x = x + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for number, block in enumerate(self.transformer["h"]):
            values = self.value_embeds[str(number)](tokens) if str(number) in self.value_embeds else None
            x = block(x, values)
        return self.lm_head(self.transformer["ln_f"](x))


class VisionBlock(nn.Module):
    """A block with the names of torchvision or of open_clip."""

    def __init__(self, width: int, heads: int, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        attention, mlp, first, second = names
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        setattr(self, attention, nn.MultiheadAttention(width, heads, batch_first=True))
        self.mlp = nn.ModuleDict({first: nn.Linear(width, 10), second: nn.Linear(10, width)})
        self.names = names
        del mlp

    def forward(self, x: Tensor) -> Tensor:
        attention, _, first, second = self.names
        y = self.ln_1(x)
        x = x + getattr(self, attention)(y, y, y, need_weights=False)[0]
        return x + self.mlp[second](nn.functional.gelu(self.mlp[first](self.ln_2(x))))


class TorchvisionViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 12))
        self.conv_proj = nn.Conv2d(3, 12, 3, 3)
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, 10, 12))
        names = ("self_attention", "mlp", "0", "3")
        self.encoder.layers = nn.ModuleDict({f"encoder_layer_{i}": VisionBlock(12, 3, names) for i in range(2)})
        self.encoder.ln = nn.LayerNorm(12)
        self.heads = nn.ModuleDict({"head": nn.Linear(12, 4)})

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_proj(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.encoder.pos_embedding
        for block in self.encoder.layers.values():
            x = block(x)
        return self.heads["head"](self.encoder.ln(x)[:, 0])


class ClipViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(12))
        self.positional_embedding = nn.Parameter(torch.zeros(10, 12))
        self.proj = nn.Parameter(torch.zeros(12, 5))
        self.conv1 = nn.Conv2d(3, 12, 3, 3, bias=False)
        self.ln_pre = nn.LayerNorm(12)
        self.transformer = nn.Module()
        names = ("attn", "mlp", "c_fc", "c_proj")
        self.transformer.resblocks = nn.ModuleList([VisionBlock(12, 3, names) for _ in range(2)])
        self.ln_post = nn.LayerNorm(12)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


def _chain() -> Built:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=2), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2)), (IMAGE,)


def _resnet(kind: str) -> Callable[[], Built]:
    return _transformers(
        "ResNetForImageClassification", "ResNetConfig", {"pixel_values": IMAGE.repeat(1, 1, 4, 4)},
        embedding_size=4, hidden_sizes=[8, 12], depths=[2, 1], layer_type=kind, num_labels=3,
    )  # fmt: skip


_T5 = {
    "vocab_size": 11, "d_model": 12, "d_kv": 4, "d_ff": 10, "num_layers": 2, "num_heads": 3, "pad_token_id": 0,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 6, "relative_attention_max_distance": 8,
}  # fmt: skip
_PAIR = {**TOKENS, "decoder_input_ids": torch.tensor([[0, 4, 6, 2, 9]])}
_WHISPER = {
    "vocab_size": 11, "num_mel_bins": 5, "d_model": 12, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 10, "decoder_ffn_dim": 14,
    "max_source_positions": 6, "max_target_positions": 8, "decoder_start_token_id": 3,
    "suppress_tokens": None, "begin_suppress_tokens": None, **IDS,
}  # fmt: skip
_MELS = torch.linspace(-2, 2, 5 * 12, dtype=torch.float64).cos().reshape(1, 5, 12)

NETWORKS: dict[str, tuple[str, Callable[[], Built]]] = {
    "gpt2": (
        "gpt2",
        _transformers(
            "GPT2LMHeadModel", "GPT2Config", TOKENS, n_embd=12, n_layer=2, n_head=3, vocab_size=11, n_positions=8, **IDS
        ),
    ),
    "nanogpt": ("nanogpt", lambda: (Nano(modern=False), (TOKENS["input_ids"],))),
    "nanogpt modern": ("nanogpt", lambda: (Nano(modern=True, value_layers=(1,)), (TOKENS["input_ids"],))),
    "llama": ("llama", _decoder("LlamaForCausalLM", head_dim=4)),
    "llama tied": ("llama", _decoder("LlamaForCausalLM", head_dim=4, tie_word_embeddings=True)),
    "mistral": ("mistral", _decoder("MistralForCausalLM", sliding_window=None)),
    "qwen2": ("qwen2", _decoder("Qwen2ForCausalLM")),
    "qwen3": ("qwen3", _decoder("Qwen3ForCausalLM", head_dim=4)),
    "gemma3": (
        "gemma3",
        _decoder("Gemma3ForCausalLM", config="Gemma3TextConfig", head_dim=4, query_pre_attn_scalar=4),
    ),
    "phi3": ("phi3", _decoder("Phi3ForCausalLM")),
    "gpt_neox": (
        "gpt_neox",
        _transformers(
            "GPTNeoXForCausalLM", "GPTNeoXConfig", TOKENS, tie_word_embeddings=False, **THREE, **SMALL, **IDS
        ),
    ),
    "bert": ("bert", _transformers("BertForMaskedLM", "BertConfig", TOKENS, **THREE, **SMALL, **IDS)),
    "bert untied": (
        "bert",
        _transformers("BertForMaskedLM", "BertConfig", TOKENS, tie_word_embeddings=False, **THREE, **SMALL, **IDS),
    ),
    "bert classifier": (
        "bert",
        _transformers("BertForSequenceClassification", "BertConfig", TOKENS, **THREE, **SMALL, **IDS),
    ),
    "roberta": (
        "roberta",
        _transformers(
            "RobertaForMaskedLM", "RobertaConfig", TOKENS, **THREE, **{**SMALL, "max_position_embeddings": 12}, **IDS
        ),
    ),
    "modernbert": (
        "modernbert",
        _transformers(
            "ModernBertForMaskedLM", "ModernBertConfig", TOKENS, cls_token_id=1, sep_token_id=2, **THREE, **SMALL, **IDS
        ),
    ),
    "vit": ("vit", lambda: (TorchvisionViT(), (IMAGE,))),
    "vit_clip": ("vit_clip", lambda: (ClipViT(), (IMAGE,))),
    "vit_hf": (
        "vit_hf",
        _transformers(
            "ViTForImageClassification", "ViTConfig", {"pixel_values": IMAGE},
            num_hidden_layers=2, image_size=9, patch_size=3, num_labels=4, **THREE,
        ),
    ),
    "resnet basic": ("resnet", _resnet("basic")),
    "resnet bottleneck": ("resnet", _resnet("bottleneck")),
    "convnext": (
        "convnext",
        _transformers(
            "ConvNextForImageClassification", "ConvNextConfig", {"pixel_values": IMAGE.repeat(1, 1, 4, 4)},
            hidden_sizes=[4, 6], depths=[2, 1], num_stages=2, num_labels=3,
        ),
    ),
    "t5": ("t5", _transformers("T5ForConditionalGeneration", "T5Config", _PAIR, **_T5)),
    "t5 gated": (
        "t5",
        _transformers(
            "T5ForConditionalGeneration", "T5Config", _PAIR, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, **_T5,
        ),
    ),
    "t5 encoder": ("t5", _transformers("T5EncoderModel", "T5Config", TOKENS, **_T5)),
    "whisper": (
        "whisper",
        _transformers(
            "WhisperForConditionalGeneration", "WhisperConfig",
            {"input_features": _MELS, "decoder_input_ids": _PAIR["decoder_input_ids"]}, **_WHISPER,
        ),
    ),
    "chain": ("sequential", _chain),
}  # fmt: skip
"""Name -> family it should be derived as, and how to build it."""
