"""T5 of transformers, whole or the encoder alone."""

from __future__ import annotations

from nowcast_proto.table.elements import Element, Neurons, Residual, Stack, Table, Vector, Weight

from nowcast_service.graph.families.family import Family
from nowcast_service.graph.families.parts import LINEAR, NORM, POSITION, TOKEN, attend, linear


def _t5() -> Table:
    """Encoder x, decoder y. One table of relative positions serves all layers, so their heads keep one order."""

    def attention(name: str, reads: str, memory: str, ends: tuple[str, str, str], heads: str) -> tuple[Element, ...]:
        names = (f"{name}.q", f"{name}.k", f"{name}.v", f"{name}.o")
        return attend(names, reads, memory, ends, heads)

    def feed_forward(layer: int, reads: str, hidden: str, up: str, after: str) -> tuple[Element, ...]:
        name = f"layer.{layer}.DenseReluDense"
        return (
            Vector(f"layer.{layer}.layer_norm.weight", NORM, reads),
            Weight(f"{name}.wi.weight|{name}.wi_0.weight", LINEAR, reads, hidden),
            Weight(f"{name}.wi_1.weight", LINEAR, reads, up, required=False),
            Residual(f"{name}.pair", up, hidden, given=f"{name}.wi_1.weight"),
            Residual(f"{name}.res", reads, after),
            Weight(f"{name}.wo.weight", LINEAR, hidden, after),
        )

    def positions(buckets: str, heads: str) -> Element:
        name = "layer.0.SelfAttention.relative_attention_bias.weight"
        return Weight(name, POSITION, buckets, heads, "st", required=False)

    return (
        Neurons(("x0",), fed_by=("tokens",)),
        Weight("shared.weight|encoder.embed_tokens.weight", TOKEN, "tokens", "x0", "st"),
        Stack(
            "encoder.block.*.",
            (
                Neurons(("q{i}", "v{i}"), fed_by=("heads", "buckets")),
                Neurons(("m{i}",)),
                Neurons(("h{i}", "up{i}")),
                Neurons(("x{i+1}",)),
                Vector("layer.0.layer_norm.weight", NORM, "x{i}"),
                *attention("layer.0.SelfAttention", "x{i}", "x{i}", ("q{i}", "v{i}", "m{i}"), "heads"),
                positions("buckets", "heads"),
                *feed_forward(1, "m{i}", "h{i}", "up{i}", "x{i+1}"),
            ),
        ),
        Vector("encoder.final_layer_norm.weight", NORM, "x{n}"),
        Neurons(("y0",)),
        Residual("shared.tied", "x0", "y0"),  # both streams begin with the same embedding
        Stack(
            "decoder.block.*.",
            (
                Neurons(("dq{j}", "dv{j}"), fed_by=("dheads", "dbuckets")),
                Neurons(("s{j}",)),
                Neurons(("cq{j}", "cv{j}"), fed_by=("cheads{j}",)),
                Neurons(("c{j}",)),
                Neurons(("dh{j}", "dup{j}")),
                Neurons(("y{j+1}",)),
                Vector("layer.0.layer_norm.weight", NORM, "y{j}"),
                *attention("layer.0.SelfAttention", "y{j}", "y{j}", ("dq{j}", "dv{j}", "s{j}"), "dheads"),
                positions("dbuckets", "dheads"),
                Vector("layer.1.layer_norm.weight", NORM, "s{j}"),
                *attention("layer.1.EncDecAttention", "s{j}", "x{n}", ("cq{j}", "cv{j}", "c{j}"), "cheads{j}"),
                *feed_forward(2, "c{j}", "dh{j}", "dup{j}", "y{j+1}"),
            ),
            var="j",
            count="m",
            required=False,
        ),
        Vector("decoder.final_layer_norm.weight", NORM, "y{m}"),
        Neurons(("pooled",)),
        *linear("classification_head.dense", "y{m}", "pooled", required=False),
        Neurons(("logits",)),
        Weight("lm_head.weight", LINEAR, "y{m}", "logits", required=False),
        *linear("classification_head.out_proj", "pooled", "logits", required=False),
        *linear("classifier", "x{n}", "logits", required=False),
    )


FAMILIES = (Family("t5", {"faithful": _t5()}, ("transformer.",)),)
