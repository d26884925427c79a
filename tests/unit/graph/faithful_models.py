"""Small real models, with the permutations of neurons that keep their function and those that break it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
import torch
from nowcast_proto.spec import ArchitectureSpec
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")


Move = tuple[str, int, Tensor]  # which tensors, which axis, in what order


@dataclass
class Case:
    model: nn.Module
    spec: ArchitectureSpec
    inputs: dict[str, Tensor]
    keep: dict[str, list[Move]] = field(default_factory=dict)
    break_: dict[str, list[Move]] = field(default_factory=dict)

    def output(self) -> Tensor:
        with torch.no_grad():
            out = self.model(**self.inputs)
        return next(out[name] for name in ("logits", "last_hidden_state") if name in out)

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def moved(self, moves: list[Move]) -> dict[str, Tensor]:
        """All tensors, with every axis that a move names put in its order."""
        tensors = self.tensors()
        for pattern, axis, order in moves:
            names = [name for name in tensors if re.search(pattern, name)]
            assert names, pattern
            for name in names:
                assert tensors[name].shape[axis] == len(order), (name, pattern)
                tensors[name] = tensors[name].index_select(axis, order)
        return tensors


def _order(n: int) -> Tensor:
    """A permutation without a fixed point."""
    return torch.arange(n).roll(1 + n // 3)


def _blocks(order: Tensor, size: int) -> Tensor:
    """A permutation of blocks of neurons, as one of neurons."""
    return (order[:, None] * size + torch.arange(size)).flatten()


def _inside(blocks: int, size: int) -> Tensor:
    """The same permutation inside every block."""
    return (torch.arange(blocks)[:, None] * size + _order(size)).flatten()


def _fused(order: Tensor, parts: int) -> Tensor:
    return torch.cat([order + part * len(order) for part in range(parts)])


def _case(family: str, model: nn.Module, inputs: dict[str, Tensor], **heads: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    parameters = [{"name": name, "shape": tuple(p.shape)} for name, p in model.named_parameters()]
    spec = ArchitectureSpec(family=family, parameters=parameters, wiring="faithful", **heads)
    return Case(model.double().eval(), spec, inputs)


TOKENS = {"input_ids": torch.tensor([[1, 5, 3, 7, 2, 8]])}


IMAGE = {"pixel_values": torch.linspace(-1, 1, 3 * 81, dtype=torch.float64).sin().reshape(1, 3, 9, 9)}


SMALL = {"vocab_size": 11, "max_position_embeddings": 8, "num_hidden_layers": 2}


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _decoder(family: str, config: str, model: str, *, head_dim: int = 2, **more: object) -> Case:
    """Llama and its kin: 12 wide, 6 heads, 2 shared, 10 hidden."""
    settings = getattr(transformers, config)(
        hidden_size=12, num_attention_heads=6, num_key_value_heads=2, intermediate_size=10,
        head_dim=head_dim, tie_word_embeddings=False, **SMALL, **IDS, **more,
    )  # fmt: skip
    case = _case(family, getattr(transformers, model)(settings), TOKENS, num_heads=6, num_kv_heads=2, head_dim=head_dim)
    stream, hidden = _order(12), _order(10)
    groups = _blocks(torch.tensor([1, 0]), 3)  # query heads follow the shared head they use
    within = torch.tensor([1, 2, 0, 3, 5, 4])  # query heads that share one
    value = _inside(2, head_dim)
    mixed = _inside(6, head_dim)
    shared = _blocks(torch.tensor([1, 0]), head_dim)
    case.keep = {
        "residual stream": [
            (r"embed_tokens|[qkv]_proj\.weight|gate_proj|up_proj|lm_head", 1, stream),
            (r"o_proj\.weight|down_proj|layernorm|model\.norm", 0, stream),
        ],
        "hidden neurons": [(r"1\.mlp\.(gate|up)_proj", 0, hidden), (r"1\.mlp\.down_proj", 1, hidden)],
        "shared heads with the query heads that use them": [
            (r"0\.self_attn\.[kv]_proj", 0, shared),
            (r"0\.self_attn\.q_proj", 0, _blocks(groups, head_dim)),
            (r"0\.self_attn\.o_proj", 1, _blocks(groups, head_dim)),
        ],
        "query heads that share": [
            (r"1\.self_attn\.q_proj", 0, _blocks(within, head_dim)),
            (r"1\.self_attn\.o_proj", 1, _blocks(within, head_dim)),
        ],
        "value neurons": [(r"0\.self_attn\.v_proj", 0, value), (r"0\.self_attn\.o_proj", 1, mixed)],
    }
    case.break_ = {
        "gate without up": [(r"0\.mlp\.gate_proj", 0, hidden), (r"0\.mlp\.down_proj", 1, hidden)],
        "query heads leave their group": [
            (r"0\.self_attn\.q_proj", 0, _blocks(_order(6), head_dim)),
            (r"0\.self_attn\.o_proj", 1, _blocks(_order(6), head_dim)),
        ],
        "query heads without outputs": [(r"0\.self_attn\.q_proj", 0, _blocks(within, head_dim))],
        "stream of one layer": [(r"layers\.1\.self_attn\.[qkv]_proj\.weight", 1, stream)],
        "values across heads": [(r"0\.self_attn\.v_proj", 0, _order(2 * head_dim))],
    }
    return case


def _llama() -> Case:
    return _decoder("llama", "LlamaConfig", "LlamaForCausalLM")


def _mistral() -> Case:
    return _decoder("mistral", "MistralConfig", "MistralForCausalLM", sliding_window=None)


def _qwen2() -> Case:
    return _decoder("qwen2", "Qwen2Config", "Qwen2ForCausalLM")


def _qwen3() -> Case:
    return _decoder("qwen3", "Qwen3Config", "Qwen3ForCausalLM", head_dim=4)


def _gemma3() -> Case:
    return _decoder("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=4, query_pre_attn_scalar=4)


def _phi3() -> Case:
    settings = transformers.Phi3Config(
        hidden_size=12, num_attention_heads=6, num_key_value_heads=2, intermediate_size=10,
        tie_word_embeddings=False, **SMALL, **IDS,
    )  # fmt: skip
    case = _case("phi3", transformers.Phi3ForCausalLM(settings), TOKENS, num_heads=6, num_kv_heads=2)
    shared, groups = _blocks(torch.tensor([1, 0]), 2), _blocks(_blocks(torch.tensor([1, 0]), 3), 2)
    case.keep = {
        "hidden neurons": [(r"0\.mlp\.gate_up", 0, _fused(_order(10), 2)), (r"0\.mlp\.down", 1, _order(10))],
        "shared heads": [
            (r"0\.self_attn\.qkv", 0, torch.cat([groups, 12 + shared, 16 + shared])),
            (r"0\.self_attn\.o_proj", 1, groups),
        ],
    }
    case.break_ = {
        "gate without up": [(r"0\.mlp\.gate_up", 0, torch.cat([_order(10), 10 + torch.arange(10)]))],
        "keys without queries": [(r"0\.self_attn\.qkv", 0, torch.cat([torch.arange(12), 12 + shared, 16 + shared]))],
    }
    return case


def _gpt2_like(family: str, model: nn.Module, axis: int) -> Case:
    """12 wide, 3 heads; fused attention with its neurons along the axis."""
    case = _case(family, model, TOKENS, num_heads=3)
    heads, inside, stream, hidden = _blocks(_order(3), 4), _inside(3, 4), _order(12), _order(48)
    back = 1 - axis
    case.keep = {
        "residual stream": [
            (r"wte|wpe|lm_head", 1, stream),
            (r"(c_attn|c_fc)\.weight", back, stream),
            (r"c_proj\.weight", axis, stream),
            (r"ln_|c_proj\.bias", 0, stream),
        ],
        "heads": [
            (r"0\.attn\.c_attn\.weight", axis, _fused(heads, 3)),
            (r"0\.attn\.c_attn\.bias", 0, _fused(heads, 3)),
            (r"0\.attn\.c_proj\.weight", back, heads),
        ],
        "query and key neurons": [
            (r"1\.attn\.c_attn\.weight", axis, torch.cat([inside, 12 + inside, 24 + torch.arange(12)])),
            (r"1\.attn\.c_attn\.bias", 0, torch.cat([inside, 12 + inside, 24 + torch.arange(12)])),
        ],
        "value neurons": [
            (r"1\.attn\.c_attn\.weight", axis, torch.cat([torch.arange(24), 24 + inside])),
            (r"1\.attn\.c_attn\.bias", 0, torch.cat([torch.arange(24), 24 + inside])),
            (r"1\.attn\.c_proj\.weight", back, inside),
        ],
        "hidden neurons": [
            (r"0\.mlp\.c_fc\.weight", axis, hidden),
            (r"0\.mlp\.c_fc\.bias", 0, hidden),
            (r"0\.mlp\.c_proj\.weight", back, hidden),
        ],
    }
    case.break_ = {
        "queries without keys": [
            (r"1\.attn\.c_attn\.weight", axis, torch.cat([inside, 12 + torch.arange(24)])),
        ],
        "query bias alone": [(r"0\.attn\.c_attn\.bias", 0, torch.cat([heads, 12 + torch.arange(24)]))],
        "neurons across heads": [
            (r"0\.attn\.c_attn\.weight", axis, _fused(_order(12), 3)),
            (r"0\.attn\.c_attn\.bias", 0, _fused(_order(12), 3)),
            (r"0\.attn\.c_proj\.weight", back, _order(12)),
        ],
        "values of other heads": [
            (r"0\.attn\.c_attn\.weight", axis, torch.cat([torch.arange(24), 24 + heads])),
            (r"0\.attn\.c_attn\.bias", 0, torch.cat([torch.arange(24), 24 + heads])),
            (r"0\.attn\.c_proj\.weight", back, heads),
        ],
    }
    return case


def _gpt2() -> Case:
    config = transformers.GPT2Config(n_embd=12, n_layer=2, n_head=3, vocab_size=11, n_positions=8, **IDS)
    return _gpt2_like("gpt2", transformers.GPT2LMHeadModel(config), 1)


def _gpt_neox() -> Case:
    settings = transformers.GPTNeoXConfig(
        hidden_size=12, num_attention_heads=3, intermediate_size=10, tie_word_embeddings=False, **SMALL, **IDS
    )
    case = _case("gpt_neox", transformers.GPTNeoXForCausalLM(settings), TOKENS, num_heads=3)
    heads = _blocks(_order(3), 4)
    inside = torch.cat([torch.cat([torch.arange(8), 8 + _order(4)]) + 12 * head for head in range(3)])
    case.keep = {
        "heads": [
            (r"0\.attention\.query_key_value", 0, _blocks(_order(3), 12)),
            (r"0\.attention\.dense\.weight", 1, heads),
        ],
        "value neurons": [
            (r"0\.attention\.query_key_value", 0, inside),
            (r"0\.attention\.dense\.weight", 1, _inside(3, 4)),
        ],
    }
    case.break_ = {"heads without outputs": [(r"0\.attention\.query_key_value", 0, _blocks(_order(3), 12))]}
    return case


def _encoder(family: str, model: nn.Module, **inputs: Tensor) -> Case:
    """Names of BERT: 12 wide, 3 heads, 10 hidden."""
    case = _case(family, model, {**TOKENS, **inputs}, num_heads=3)
    heads, inside, stream, hidden = _blocks(_order(3), 4), _inside(3, 4), _order(12), _order(10)
    case.keep = {
        "heads": [(r"0\.attention\.self\.", 0, heads), (r"0\.attention\.output\.dense\.weight", 1, heads)],
        "query and key neurons": [(r"1\.attention\.self\.(query|key)", 0, inside)],
        "value neurons": [
            (r"1\.attention\.self\.value", 0, inside),
            (r"1\.attention\.output\.dense\.weight", 1, inside),
        ],
        "hidden neurons": [(r"0\.intermediate", 0, hidden), (r"0\.output\.dense\.weight", 1, hidden)],
        "residual stream and the transform tied to it": [
            (r"\w+_embeddings\.weight|self\.\w+\.weight|(intermediate|transform|lm_head)\.dense\.weight", 1, stream),
            (r"\.output\.dense\.|LayerNorm|layer_norm|(transform|lm_head)\.dense\.", 0, stream),
        ],
    }
    case.break_ = {
        "queries without keys": [(r"1\.attention\.self\.query", 0, inside)],
        "query bias alone": [(r"1\.attention\.self\.query\.bias", 0, inside)],
        "neurons across heads": [
            (r"0\.attention\.self\.", 0, _order(12)),
            (r"0\.attention\.output\.dense\.weight", 1, _order(12)),
        ],
    }
    return case


def _bert() -> Case:
    config = transformers.BertConfig(hidden_size=12, num_attention_heads=3, intermediate_size=10, **SMALL, **IDS)
    return _encoder("bert", transformers.BertForMaskedLM(config))


def _roberta() -> Case:
    settings = {**SMALL, "max_position_embeddings": 12}
    config = transformers.RobertaConfig(hidden_size=12, num_attention_heads=3, intermediate_size=10, **settings, **IDS)
    return _encoder("roberta", transformers.RobertaForMaskedLM(config))


def _modernbert() -> Case:
    settings = transformers.ModernBertConfig(
        hidden_size=12, num_attention_heads=3, intermediate_size=10, cls_token_id=1, sep_token_id=2, **SMALL, **IDS
    )
    settings._attn_implementation = "eager"
    case = _case("modernbert", transformers.ModernBertForMaskedLM(settings), TOKENS, num_heads=3)
    heads = _blocks(_order(3), 4)
    case.keep = {
        "heads": [(r"0\.attn\.Wqkv", 0, _fused(heads, 3)), (r"0\.attn\.Wo", 1, heads)],
        "hidden neurons": [(r"1\.mlp\.Wi", 0, _fused(_order(10), 2)), (r"1\.mlp\.Wo", 1, _order(10))],
        "residual stream and the head tied to it": [
            (r"tok_embeddings|Wqkv|Wi|head\.dense", 1, _order(12)),
            (r"Wo|norm|head\.dense", 0, _order(12)),
        ],
    }
    case.break_ = {"gate alone": [(r"1\.mlp\.Wi", 0, torch.cat([torch.arange(10), 10 + _order(10)]))]}
    return case


def _vit() -> Case:
    settings = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=10, image_size=9, patch_size=3,
        num_labels=4,
    )  # fmt: skip
    case = _case("vit_hf", transformers.ViTForImageClassification(settings), IMAGE, num_heads=3)
    heads, inside, stream = _blocks(_order(3), 4), _inside(3, 4), _order(12)
    case.keep = {
        "heads": [(r"0\.attention\.[qkv]_proj", 0, heads), (r"0\.attention\.o_proj\.weight", 1, heads)],
        "query and key neurons": [(r"1\.attention\.[qk]_proj", 0, inside)],
        "hidden neurons": [(r"0\.mlp\.fc1", 0, _order(10)), (r"0\.mlp\.fc2\.weight", 1, _order(10))],
        "residual stream": [
            (r"cls_token|position_embeddings", 2, stream),
            (r"projection|o_proj|fc2|layernorm", 0, stream),
            (r"[qkv]_proj\.weight|fc1\.weight|classifier\.weight", 1, stream),
        ],
    }
    case.break_ = {
        "query bias alone": [(r"1\.attention\.q_proj\.bias", 0, inside)],
        "values across heads": [
            (r"1\.attention\.v_proj", 0, _order(12)),
            (r"1\.attention\.o_proj\.weight", 1, _order(12)),
        ],
    }
    return case


def _resnet(kind: str) -> Case:
    settings = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 12], depths=[2, 1], layer_type=kind, num_labels=3
    )
    model = transformers.ResNetForImageClassification(settings)
    case = _case("resnet", model, {"pixel_values": IMAGE["pixel_values"].repeat(1, 1, 4, 4)})
    for name, buffer in model.named_buffers():
        assert bool((buffer == buffer.flatten()[0]).all()), name  # running statistics do not tell channels apart
    last = 1 if kind == "basic" else 2
    stage, stem, inner = _order(8), _order(4), _order(8 if kind == "basic" else 2)
    case.keep = {
        "channels of a stage": [
            (rf"stages\.0\.layers\.\d\.(shortcut|layer\.{last})\.", 0, stage),
            (r"stages\.0\.layers\.1\.layer\.0\.convolution", 1, stage),
            (r"stages\.1\.layers\.0\.(shortcut|layer\.0)\.convolution", 1, stage),
        ],
        "channels inside a block": [
            (r"stages\.0\.layers\.1\.layer\.0\.", 0, inner),
            (r"stages\.0\.layers\.1\.layer\.1\.convolution", 1, inner),
        ],
        "channels of the stem": [
            (r"embedder", 0, stem),
            (r"stages\.0\.layers\.0\.(shortcut|layer\.0)\.convolution", 1, stem),
        ],
    }
    case.break_ = {
        "one block of a stage": [
            (rf"stages\.0\.layers\.1\.layer\.{last}\.", 0, stage),
            (r"stages\.1\.layers\.0\.(shortcut|layer\.0)\.convolution", 1, stage),
        ],
        "shortcut alone": [(r"stages\.0\.layers\.0\.shortcut\.", 0, stage)],
    }
    return case


def _resnet_basic() -> Case:
    return _resnet("basic")


def _resnet_bottleneck() -> Case:
    return _resnet("bottleneck")


def _convnext() -> Case:
    settings = transformers.ConvNextConfig(hidden_sizes=[4, 6], depths=[2, 1], num_stages=2, num_labels=3)
    model = transformers.ConvNextForImageClassification(settings)
    case = _case("convnext", model, {"pixel_values": IMAGE["pixel_values"].repeat(1, 1, 4, 4)})
    hidden = _order(16)
    case.keep = {
        "hidden neurons": [
            (r"stages\.0\.layers\.1\.pwconv1", 0, hidden),
            (r"stages\.0\.layers\.1\.pwconv2\.weight", 1, hidden),
        ],
        "channels of a stage": [
            (r"convnext\.embeddings|stages\.0\.layers\.\d\.(layer_scale|dwconv|layernorm|pwconv2)", 0, _order(4)),
            (r"stages\.0\.layers\.\d\.pwconv1\.weight|stages\.1\.downsampling_layer\.1\.weight", 1, _order(4)),
            (r"stages\.1\.downsampling_layer\.0", 0, _order(4)),
        ],
    }
    case.break_ = {"hidden neurons without outputs": [(r"stages\.0\.layers\.1\.pwconv1", 0, hidden)]}
    return case


CASES = [
    _llama, _mistral, _qwen2, _qwen3, _gemma3, _phi3, _gpt2, _gpt_neox, _bert, _roberta, _modernbert, _vit,
    _resnet_basic, _resnet_bottleneck, _convnext,
]  # fmt: skip
