"""BERT and RoBERTa of transformers with their heads."""

from __future__ import annotations

from nowcast_proto.table.elements import Element, Heads, Neurons, Residual, Same, Stack, Vector, Weight

from nowcast_service.graph.families.family import Family
from nowcast_service.graph.families.parts import (
    KEY,
    LAYER,
    LINEAR,
    NORM,
    OTHER,
    POSITION,
    QUERY,
    TOKEN,
    VALUE,
    embedding,
    linear,
    masked_head,
    norm,
)


def _bert(*, published: bool) -> tuple[Element, ...]:
    query, key, value = (f"attention.self.{name}" for name in ("query", "key", "value"))
    return (
        Neurons(("x0",), fed_by=("tokens", "positions", "types")),
        embedding("embeddings.word_embeddings.weight", TOKEN, "tokens", transposed=published),
        embedding("embeddings.position_embeddings.weight", POSITION, "positions", transposed=published),
        embedding("embeddings.token_type_embeddings.weight", OTHER, "types", transposed=published),
        *norm("embeddings.LayerNorm", "x0"),
        Stack(
            "encoder.layer.*.",
            (
                *LAYER,
                Weight(f"{query}.weight", QUERY, "x{i}", "q{i}"),
                Heads(f"{query}.head", "heads{i}", "q{i}"),
                Vector(f"{query}.bias", OTHER, "q{i}"),
                Weight(f"{key}.weight", KEY, "q{i}", "x{i}", "st"),
                Vector(f"{key}.bias", OTHER, "x{i}" if published else "q{i}", reverse=not published),
                Weight(f"{value}.weight", VALUE, "x{i}", "v{i}"),
                Heads(f"{value}.head", "heads{i}", "v{i}"),
                Vector(f"{value}.bias", OTHER, "v{i}"),
                Residual(f"{value}.res", "x{i}", "m{i}"),
                *linear("attention.output.dense", "v{i}", "m{i}"),
                *norm("attention.output.LayerNorm", "m{i}"),
                *linear("intermediate.dense", "m{i}", "h{i}"),
                Residual("intermediate.dense.res", "m{i}", "x{i+1}"),
                *linear("output.dense", "h{i}", "x{i+1}"),
                *norm("output.LayerNorm", "x{i+1}"),
            ),
        ),
        *(
            (Vector("cls.predictions.bias|lm_head.bias", OTHER, "tokens", reverse=True),)
            if published
            else masked_head(
                "cls.predictions.decoder.weight|lm_head.decoder.weight",
                "cls.predictions.bias|lm_head.bias",
                "cls.predictions.decoder.bias|lm_head.decoder.bias",
            )
        ),
        Neurons(("transform",)),
        Weight(
            "cls.predictions.transform.dense.weight|lm_head.dense.weight", LINEAR, "x{n}", "transform", required=False
        ),
        Vector("cls.predictions.transform.dense.bias|lm_head.dense.bias", OTHER, "transform"),
        Vector("cls.predictions.transform.LayerNorm.weight|lm_head.layer_norm.weight", NORM, "transform"),
        Vector("cls.predictions.transform.LayerNorm.bias|lm_head.layer_norm.bias", OTHER, "transform"),
        Neurons(("pooled",)),
        # A classifier reads the pooled first token where there is a pooler, the stream itself where there is none.
        Same("pooled", "x{n}", unless="pooler.dense.weight|classifier.dense.weight"),
        Weight("pooler.dense.weight|classifier.dense.weight", LINEAR, "x{n}", "pooled", required=False),
        Vector("pooler.dense.bias|classifier.dense.bias", OTHER, "pooled"),
        Neurons(("labels",)),
        Weight(
            "classifier.weight|classifier.out_proj.weight|qa_outputs.weight", LINEAR, "pooled", "labels", required=False
        ),
        Vector("classifier.bias|classifier.out_proj.bias|qa_outputs.bias", OTHER, "labels"),
    )


FAMILIES = (
    Family("bert", {"published": _bert(published=True), "faithful": _bert(published=False)}, ("bert.",)),
    Family("roberta", {"faithful": _bert(published=False)}, ("roberta.",)),
)
