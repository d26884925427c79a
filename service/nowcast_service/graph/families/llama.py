"""Decoders with the names of Llama: gated feed-forwards, rotary positions, shared keys and values."""

from __future__ import annotations

from nowcast_proto.table.elements import (
    Count,
    Cut,
    Diagonal,
    Element,
    Heads,
    Neurons,
    Residual,
    Same,
    Spread,
    Stack,
    Table,
    Vector,
    Weight,
)

from nowcast_service.graph.families.family import Family
from nowcast_service.graph.families.parts import (
    FAITHFUL_LAYER,
    KEY,
    LINEAR,
    NORM,
    QUERY,
    TOKEN,
    VALUE,
    attention,
    embedding,
    linear,
)

_LLAMA_PUBLISHED: tuple[Element, ...] = (
    Neurons(("x0",), fed_by=("tokens",)),
    embedding("embed_tokens.weight", TOKEN, "tokens", transposed=True),
    Stack(
        "layers.*.",
        (
            Neurons(("q{i}", "v{i}"), fed_by=("heads{i}",)),
            Neurons(("m{i}", "copy{i}")),
            Neurons(("h{i}",)),
            Neurons(("x{i+1}",)),
            Weight("self_attn.q_proj.weight", QUERY, "x{i}", "q{i}"),
            Heads("self_attn.q_proj.head", "heads{i}", "q{i}"),
            Weight("self_attn.k_proj.weight", KEY, "q{i}:first", "x{i}", "st"),
            Weight("self_attn.v_proj.weight", VALUE, "x{i}", "v{i}"),
            Heads("self_attn.v_proj.head", "heads{i}:first", "v{i}", count="K"),
            Residual("self_attn.v_proj.res", "x{i}", "m{i}"),
            Weight("self_attn.o_proj.weight", LINEAR, "v{i}:last", "m{i}"),
            Diagonal("self_attn.q_norm.weight", NORM, "q{i}:first", "q{i}:next"),
            Diagonal("self_attn.k_norm.weight", NORM, "x{i}:first", "x{i}:next"),
            Weight("mlp.gate_proj.weight", LINEAR, "m{i}", "h{i}"),
            Residual("mlp.gate_proj.res", "m{i}", "x{i+1}"),
            Weight("mlp.up_proj.weight", LINEAR, "copy{i}", "h{i}"),
            Residual("mlp.up_proj.res", "copy{i}", "x{i+1}"),
            Weight("mlp.down_proj.weight", LINEAR, "h{i}", "x{i+1}"),
            Vector("input_layernorm.weight", NORM, "x{i+1}"),
            Vector("post_attention_layernorm.weight", NORM, "x{i+1}"),
        ),
    ),
    Vector("norm.weight", NORM, "x{n}"),
    Neurons(("logits",)),
    Weight("lm_head.weight", LINEAR, "x{n}", "logits", required=False),
)

_HEAD_NORMS: tuple[Element, ...] = (
    Vector("self_attn.q_norm.weight", NORM, "q_norm{i}"),
    Spread("self_attn.q_norm.shared", "q_norm{i}", "q{i}", few=1),
    Vector("self_attn.k_norm.weight", NORM, "k_norm{i}", reverse=True),
    Spread("self_attn.k_norm.shared", "k_norm{i}", "k{i}", few=1, many="K", fold=True),
)
"""One norm for all heads: a neuron per place in a head, linked to that place of every head."""

_GATED: tuple[Element, ...] = (
    *linear("mlp.gate_proj", "m{i}", "h{i}"),
    *linear("mlp.up_proj", "m{i}", "up{i}"),
    Residual("mlp.up_proj.pair", "up{i}", "h{i}"),
    Residual("mlp.gate_proj.res", "m{i}", "x{i+1}"),
    *linear("mlp.down_proj", "h{i}", "x{i+1}"),
)
"""A gated feed-forward: gate and up neurons are told apart and paired one to one."""

_FUSED_GATED: tuple[Element, ...] = (
    Weight("mlp.gate_up_proj.weight", LINEAR, "m{i}", "h{i}", label="mlp.gate_proj.weight", cut=Cut(0, 0, (1, 1))),
    Weight("mlp.gate_up_proj.weight", LINEAR, "m{i}", "up{i}", label="mlp.up_proj.weight", cut=Cut(0, 1, (1, 1))),
    Residual("mlp.up_proj.pair", "up{i}", "h{i}"),
    Residual("mlp.gate_up_proj.res", "m{i}", "x{i+1}"),
    *linear("mlp.down_proj", "h{i}", "x{i+1}"),
)


def _decoder(attention: tuple[Element, ...], feed_forward: tuple[Element, ...], *, sandwich: bool = False) -> Table:
    """Decoders with the names of Llama, wired faithfully.

    Args:
        attention: Elements from ``x{i}`` to ``m{i}``.
        feed_forward: Elements from ``m{i}`` to ``x{i+1}``.
        sandwich: The norm after attention scales what attention adds, and the feed-forward has norms of its own.
    """
    inner: tuple[Element, ...] = (Vector("post_attention_layernorm.weight", NORM, "m{i}"),)
    outer: tuple[Element, ...] = ()
    if sandwich:
        inner = (*inner, Vector("pre_feedforward_layernorm.weight", NORM, "m{i}"))
        outer = (Vector("post_feedforward_layernorm.weight", NORM, "x{i+1}"),)
    return (
        Neurons(("x0",), fed_by=("tokens",)),
        embedding("embed_tokens.weight", TOKEN, "tokens"),
        Stack(
            "layers.*.",
            (
                *FAITHFUL_LAYER,
                Vector("input_layernorm.weight", NORM, "x{i}"),
                *attention,
                *inner,
                *feed_forward,
                *outer,
            ),
        ),
        Vector("norm.weight", NORM, "x{n}"),
        Neurons(("logits",)),
        *linear("lm_head", "x{n}", "logits", required=False),
    )


_SEPARATE = attention("self_attn.", "q_proj", "k_proj", "v_proj", "o_proj", rotary=True)


def _shared_fused(weight: str, label: str, out: str) -> tuple[Element, ...]:
    """Faithful attention with query, key and value fused as H : K : K heads, one after another."""
    ratio: tuple[Count, ...] = ("H", "K", "K")
    return (
        Same("k{i}", "q{i}", when="mha"),
        Same("z{i}", "v{i}", when="mha"),
        Weight(weight, QUERY, "x{i}", "q{i}", label=f"{label}q.weight", cut=Cut(0, 0, ratio)),
        Heads(f"{label}q.head", "heads{i}", "q{i}", ordered=True),
        Weight(weight, KEY, "k{i}", "x{i}", "st", label=f"{label}k.weight", cut=Cut(0, 1, ratio)),
        Spread(f"{label}k.shared", "k{i}", "q{i}", fold=True),
        Weight(weight, VALUE, "x{i}", "v{i}", label=f"{label}v.weight", cut=Cut(0, 2, ratio)),
        Spread(f"{label}v.shared", "v{i}", "z{i}"),
        Heads(f"{label}v.head", "heads{i}", "z{i}"),
        Residual(f"{label}v.res", "x{i}", "m{i}"),
        *linear(out, "z{i}", "m{i}"),
    )


_LLAMA = _decoder(_SEPARATE, _GATED)
_QWEN3 = _decoder((*_SEPARATE, *_HEAD_NORMS), _GATED)
_GEMMA3 = _decoder((*_SEPARATE, *_HEAD_NORMS), _GATED, sandwich=True)
_PHI3 = _decoder(_shared_fused("self_attn.qkv_proj.weight", "self_attn.", "self_attn.o_proj"), _FUSED_GATED)


FAMILIES = (
    Family("llama", {"published": _LLAMA_PUBLISHED, "faithful": _LLAMA}, ("model.",)),
    Family("qwen3", {"published": _LLAMA_PUBLISHED, "faithful": _QWEN3}, ("model.",)),
    Family("mistral", {"faithful": _LLAMA}, ("model.",)),
    Family("qwen2", {"faithful": _LLAMA}, ("model.",)),
    Family("gemma3", {"faithful": _GEMMA3}, ("model.",)),
    Family("phi3", {"faithful": _PHI3}, ("model.",)),
)
