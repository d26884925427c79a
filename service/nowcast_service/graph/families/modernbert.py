"""ModernBERT of transformers: rotary positions, gated feed-forwards, a masked-token head."""

from __future__ import annotations

from nowcast_proto.table.elements import Cut, Neurons, Residual, Stack, Table, Weight

from nowcast_service.graph.families.family import Family
from nowcast_service.graph.families.parts import LINEAR, TOKEN, embedding, fused_attention, linear, masked_head, norm

_MODERNBERT: Table = (
    Neurons(("x0",), fed_by=("tokens",)),
    embedding("embeddings.tok_embeddings.weight", TOKEN, "tokens"),
    *norm("embeddings.norm", "x0"),
    Stack(
        "layers.*.",
        (
            Neurons(("q{i}", "v{i}"), fed_by=("heads{i}",)),
            Neurons(("m{i}",)),
            Neurons(("h{i}", "up{i}")),
            Neurons(("x{i+1}",)),
            *norm("attn_norm", "x{i}"),
            *fused_attention(
                "attn.Wqkv.weight", "attn.Wqkv.bias", "attn.", transposed=False, published=False, rotary=True
            ),
            *linear("attn.Wo", "v{i}", "m{i}"),
            *norm("mlp_norm", "m{i}"),
            Weight("mlp.Wi.weight", LINEAR, "m{i}", "h{i}", label="mlp.Wi.input.weight", cut=Cut(0, 0, (1, 1))),
            Weight("mlp.Wi.weight", LINEAR, "m{i}", "up{i}", label="mlp.Wi.gate.weight", cut=Cut(0, 1, (1, 1))),
            Residual("mlp.Wi.pair", "up{i}", "h{i}"),
            Residual("mlp.Wi.res", "m{i}", "x{i+1}"),
            *linear("mlp.Wo", "h{i}", "x{i+1}"),
        ),
    ),
    *norm("final_norm", "x{n}"),
    Neurons(("transform",)),
    *linear("head.dense", "x{n}", "transform", required=False),
    *norm("head.norm", "transform"),
    *masked_head("decoder.weight", "decoder.bias"),
    Neurons(("labels",)),
    *linear("classifier", "transform", "labels", required=False),
)


FAMILIES = (Family("modernbert", {"faithful": _MODERNBERT}, ("model.",)),)
