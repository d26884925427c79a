"""Which family a network is, told by the names and shapes of its tensors and by its config, importing no model library.

A family is only named where its table wires what is there. Names that look familiar on a network of another type
(``config.model_type``), and variants whose wiring differs, are not taken for it: a wrong graph would be silent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nowcast_proto.errors import UnsupportedArchitecture

Shapes = Mapping[str, tuple[int, ...]]

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "nhead", "encoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_kv_head")
_WIDTH = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class Rule:
    """How to tell one family.

    Attributes:
        family: Its name.
        names: Regular expressions; each must be found in some tensor's name.
        without: None of these may be found.
        types: ``config.model_type`` may be one of these; a model without a type is judged by its names alone.
        shape: What the shape of the tensor found first must satisfy.
        variant: Says what is different in a variant this family's table does not wire; empty where nothing is.
        heads: It has attention heads.
        fixed: Tensors that never train but have a place in the table: they travel although they are frozen.
        told: Only where the config says so: the names alone are another family's.
    """

    family: str
    names: tuple[str, ...]
    without: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    shape: Callable[[tuple[int, ...]], bool] = lambda shape: True
    variant: Callable[[Any], str] = lambda config: ""
    heads: bool = True
    fixed: str | None = None
    told: bool = False

    def fits(self, shapes: Shapes, model_type: str) -> bool:
        """Whether a network with these tensors is of this family."""
        if model_type not in self.types and (model_type or self.told):
            return False
        first = _found(self.names[0], shapes)
        return (
            first is not None
            and self.shape(shapes[first])
            and all(_found(name, shapes) for name in self.names[1:])
            and not any(_found(name, shapes) for name in self.without)
        )


def _found(pattern: str, shapes: Shapes) -> str | None:
    compiled = re.compile(pattern)
    return next((name for name in shapes if compiled.search(name)), None)


def _serial_residuals(config: Any) -> str:
    serial = getattr(config, "use_parallel_residual", True) is False
    return "attention and feed-forward follow one another (use_parallel_residual=False)" if serial else ""


def _uneven_heads(config: Any) -> str:
    encoder, decoder = (getattr(config, f"{side}_attention_heads", None) for side in ("encoder", "decoder"))
    return f"encoder and decoder have {encoder} and {decoder} heads" if encoder != decoder else ""


def _is_wide(shape: tuple[int, ...]) -> bool:
    # GPT-2 stores its fused projection (in, 3 in); nanoGPT uses the same names for an nn.Linear's (3 in, in).
    return len(shape) == 2 and shape[1] == 3 * shape[0]


def _is_tall(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == 3 * shape[1]


_LAYER = r"^(model\.)?layers\.0\."
_GATED = (r"embed_tokens\.weight$", _LAYER + r"mlp\.gate_proj\.weight$", _LAYER + r"mlp\.up_proj\.weight$")
_QUERY = _LAYER + r"self_attn\.q_proj\.weight$"
_QK_NORM, _QK_BIAS = r"self_attn\.[qk]_norm", r"self_attn\.[qk]_proj\.bias$"
_OTHER_NORMS = (r"pre_feedforward_layernorm", r"post_self_attn_layernorm", r"self_attn\.sinks$", r"\.experts\.")
_BERT = r"(^|^\w+\.)encoder\.layer\.0\.attention\.self\.query\.weight$"
_ROBERTAS = ("roberta", "xlm-roberta", "camembert")
_GPT = r"^(transformer\.)?h\.0\."

RULES = (
    Rule("gpt2", (_GPT + r"attn\.c_attn\.weight$",), (r"crossattention",), ("gpt2",), _is_wide),
    Rule("nanogpt", (_GPT + r"attn\.c_attn\.weight$", r"wte\.weight$"), (r"crossattention",), shape=_is_tall),
    Rule("nanogpt", (_GPT + r"attn\.c_q\.weight$", r"wte\.weight$")),
    Rule(
        "gemma3",
        (_QUERY, *_GATED, _QK_NORM, r"pre_feedforward_layernorm"),
        (r"experts",),
        ("gemma3_text", "gemma3"),
    ),
    Rule("qwen3", (_QUERY, *_GATED, _QK_NORM), (_QK_BIAS, *_OTHER_NORMS), ("qwen3",)),
    Rule("qwen2", (_QUERY, *_GATED, _QK_BIAS), (_QK_NORM, r"o_proj\.bias$", *_OTHER_NORMS), ("qwen2",)),
    Rule("mistral", (_QUERY, *_GATED), (_QK_NORM, _QK_BIAS, *_OTHER_NORMS), ("mistral",), told=True),
    Rule("llama", (_QUERY, *_GATED), (_QK_NORM, _QK_BIAS, *_OTHER_NORMS), ("llama",)),
    Rule(
        "phi3",
        (_LAYER + r"self_attn\.qkv_proj\.weight$", _LAYER + r"mlp\.gate_up_proj\.weight$", r"embed_tokens\.weight$"),
        types=("phi3",),
    ),
    Rule(
        "gpt_neox",
        (r"^(gpt_neox\.)?layers\.0\.attention\.query_key_value\.weight$", r"embed_in\.weight$"),
        types=("gpt_neox",),
        variant=_serial_residuals,
    ),
    Rule("roberta", (_BERT, r"^roberta\.embeddings\.word_embeddings\.weight$"), (r"crossattention",), _ROBERTAS),
    Rule("roberta", (_BERT, r"^embeddings\.word_embeddings\.weight$"), (r"crossattention",), _ROBERTAS, told=True),
    Rule("bert", (_BERT, r"^(bert\.)?embeddings\.word_embeddings\.weight$"), (r"crossattention",), ("bert",)),
    Rule(
        "modernbert",
        (r"^(model\.)?layers\.0\.attn\.Wqkv\.weight$", r"^(model\.)?embeddings\.tok_embeddings\.weight$"),
        types=("modernbert",),
    ),
    Rule("vit", (r"^encoder\.layers\.encoder_layer_0\.self_attention\.in_proj_weight$", r"^conv_proj\.weight$")),
    Rule(
        "vit_clip",
        (r"^(visual\.)?transformer\.resblocks\.0\.attn\.in_proj_weight$", r"(^|\.)class_embedding$"),
        (r"token_embedding\.weight$",),
    ),
    Rule(
        "vit_hf",
        (
            r"^(vit\.)?(layers\.0\.attention\.q_proj|encoder\.layer\.0\.attention\.attention\.query)\.weight$",
            r"embeddings\.patch_embeddings\.projection\.weight$",
        ),
        (r"distillation_token", r"mask_token", r"layer_scale", r"^decoder\."),
        ("vit",),
    ),
    Rule("resnet", (r"^layer1\.0\.conv1\.weight$", r"^conv1\.weight$", r"^bn1\.weight$"), heads=False),
    Rule(
        "resnet",
        (
            r"^(resnet\.)?encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.weight$",
            r"embedder\.embedder\.convolution\.weight$",
        ),
        types=("resnet",),
        heads=False,
    ),
    Rule(
        "convnext",
        (r"^(convnext\.)?encoder\.stages\.0\.layers\.0\.dwconv\.weight$", r"embeddings\.patch_embeddings\.weight$"),
        (r"\.grn\.",),
        ("convnext",),
        heads=False,
    ),
    Rule(
        "t5",
        (
            r"^(transformer\.)?encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$",
            r"relative_attention_bias\.weight$",
        ),
        (r"block\.1\.layer\.0\.SelfAttention\.relative_attention_bias", r"\.router\.", r"\.experts\."),
        ("t5", "mt5"),
    ),
    Rule(
        "whisper",
        (r"^(model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight$", r"^(model\.)?encoder\.conv1\.weight$"),
        types=("whisper",),
        variant=_uneven_heads,
        fixed=r"encoder\.embed_positions\.weight$",
    ),
)
"""In order: the first that fits is taken."""


def recognise(shapes: Shapes, config: Any) -> Rule | None:
    """The family of a network, or None.

    Args:
        shapes: Name -> shape of its tensors.
        config: Whatever the model calls its config; may be None.

    Raises:
        UnsupportedArchitecture: It is of a family, but a variant whose wiring differs.
    """
    model_type = told_type(config)
    for rule in RULES:
        if rule.fits(shapes, model_type):
            if variant := rule.variant(config):
                raise UnsupportedArchitecture(
                    f"this {rule.family} network is a variant: {variant}",
                    expected="the usual one",
                    remedy="give a table of your own with derive_spec(model, table=…)",
                )
            return rule
    return None


def told_type(config: Any) -> str:
    """``config.model_type``, or an empty string."""
    return str(_get(config, "model_type") or "")


def heads_of(modules: Iterable[Any], config: Any) -> dict[str, int]:
    """``num_heads``, ``num_kv_heads`` and ``head_dim`` as far as the spec needs them; empty where nothing says so.

    Args:
        modules: The network's modules, asked where there is no config.
        config: The model's config, or None.
    """
    heads = _integer(config, _HEADS)
    kv_heads, head_dim, width = (_integer(config, names) for names in (_KV_HEADS, ("head_dim", "d_kv"), _WIDTH))
    if heads is None:
        told = {value for module in modules if (value := _integer(module, _HEADS)) is not None}
        if len(told) != 1:
            return {}
        heads = told.pop()
    found = {"num_heads": heads}
    if kv_heads is not None and kv_heads != heads:
        found["num_kv_heads"] = kv_heads
    if head_dim is not None and width is not None and head_dim * heads != width:
        found["head_dim"] = head_dim
    return found


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _integer(holder: Any, names: Iterable[str]) -> int | None:
    for name in names:
        value = _get(holder, name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
