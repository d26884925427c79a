"""GPT-2 of transformers: query, key and value fused, stored (in, out)."""

from __future__ import annotations

from nowcast_proto.table.elements import Element, Neurons, Residual, Stack

from nowcast_service.graph.families.family import Family
from nowcast_service.graph.families.parts import LAYER, POSITION, TOKEN, embedding, fused_attention, linear, norm


def _gpt2(*, published: bool) -> tuple[Element, ...]:
    return (
        Neurons(("x0",), fed_by=("tokens", "positions")),
        embedding("wte.weight", TOKEN, "tokens"),
        embedding("wpe.weight", POSITION, "positions"),
        Stack(
            "h.*.",
            (
                *LAYER,
                *norm("ln_1", "x{i}"),
                *fused_attention(
                    "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_attn.", transposed=True, published=published
                ),
                *linear("attn.c_proj", "v{i}", "m{i}", stored="st"),
                *norm("ln_2", "m{i}"),
                *linear("mlp.c_fc", "m{i}", "h{i}", stored="st"),
                Residual("mlp.c_fc.res", "m{i}", "x{i+1}"),
                *linear("mlp.c_proj", "h{i}", "x{i+1}", stored="st"),
            ),
        ),
        *norm("ln_f", "x{n}"),
        Neurons(("logits",)),
        *linear("lm_head", "x{n}", "logits", required=False),
    )


FAMILIES = (
    Family("gpt2", {"published": _gpt2(published=True), "faithful": _gpt2(published=False)}, ("transformer.",)),
)
