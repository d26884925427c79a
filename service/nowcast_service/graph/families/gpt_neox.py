"""GPT-NeoX with parallel residuals, as in Pythia."""

from __future__ import annotations

from nowcast_proto.table.elements import Cut, Element, Heads, Neurons, Residual, Stack, Table, Vector, Weight

from nowcast_service.graph.families.family import Family
from nowcast_service.graph.families.parts import KEY, LINEAR, OTHER, QUERY, TOKEN, VALUE, embedding, linear, norm


def _neox_attention() -> tuple[Element, ...]:
    """Query, key and value alternate head by head; attention and feed-forward read the same stream."""
    weight, bias, label = (f"attention.{part}" for part in ("query_key_value.weight", "query_key_value.bias", ""))
    parts = [Cut(0, index, per_head=True) for index in range(3)]
    return (
        Weight(weight, QUERY, "x{i}", "q{i}", label=f"{label}q.weight", cut=parts[0]),
        Heads(f"{label}q.head", "heads{i}", "q{i}", ordered=True),
        Vector(bias, OTHER, "q{i}", label=f"{label}q.bias", cut=parts[0]),
        Weight(weight, KEY, "q{i}", "x{i}", "st", label=f"{label}k.weight", cut=parts[1]),
        Vector(bias, OTHER, "q{i}", label=f"{label}k.bias", cut=parts[1], reverse=True),
        Weight(weight, VALUE, "x{i}", "v{i}", label=f"{label}v.weight", cut=parts[2]),
        Heads(f"{label}v.head", "heads{i}", "v{i}"),
        Vector(bias, OTHER, "v{i}", label=f"{label}v.bias", cut=parts[2]),
        Residual(f"{label}v.res", "x{i}", "x{i+1}"),
        *linear("attention.dense", "v{i}", "x{i+1}"),
    )


_GPT_NEOX: Table = (
    Neurons(("x0",), fed_by=("tokens",)),
    embedding("embed_in.weight", TOKEN, "tokens"),
    Stack(
        "layers.*.",
        (
            Neurons(("q{i}", "v{i}", "h{i}"), fed_by=("heads{i}",)),
            Neurons(("x{i+1}",)),
            *norm("input_layernorm", "x{i}"),
            *_neox_attention(),
            *norm("post_attention_layernorm", "x{i}"),
            *linear("mlp.dense_h_to_4h", "x{i}", "h{i}"),
            *linear("mlp.dense_4h_to_h", "h{i}", "x{i+1}"),
        ),
    ),
    *norm("final_layer_norm", "x{n}"),
    Neurons(("logits",)),
    Weight("embed_out.weight|lm_head.weight", LINEAR, "x{n}", "logits", required=False),
)


FAMILIES = (Family("gpt_neox", {"faithful": _GPT_NEOX}, ("gpt_neox.",)),)
