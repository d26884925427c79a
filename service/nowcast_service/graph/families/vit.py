"""Vision transformers of torchvision, open_clip and transformers."""

from __future__ import annotations

from collections.abc import Callable

from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.table.elements import Element, Neurons, Residual, Stack, Vector, Weight

from nowcast_service.graph.families.family import Expansion, Family
from nowcast_service.graph.families.parts import (
    CONV,
    FAITHFUL_LAYER,
    LAYER,
    LINEAR,
    OTHER,
    POSITION,
    TOKEN,
    attention,
    embedding,
    fused_attention,
    linear,
    norm,
)


def _vit(*, published: bool) -> tuple[Element, ...]:
    """Names of torchvision."""
    return (
        Neurons(("x0",), fed_by=("channels", "positions")),
        Vector("class_token", TOKEN, "x0", label="class_token.weight"),
        Weight("conv_proj.weight", CONV, "channels", "x0"),
        Vector("conv_proj.bias", OTHER, "x0"),
        embedding(
            "encoder.pos_embedding",
            POSITION,
            "positions",
            label="encoder.pos_embedding.weight",
            transposed=published,
        ),
        Stack(
            "encoder.layers.encoder_layer_*.",
            (
                *LAYER,
                *norm("ln_1", "x{i}"),
                *fused_attention(
                    "self_attention.in_proj_weight",
                    "self_attention.in_proj_bias",
                    "self_attention.in_proj_",
                    transposed=False,
                    published=published,
                ),
                *linear("self_attention.out_proj", "v{i}", "m{i}"),
                *norm("ln_2", "m{i}"),
                *linear("mlp.0", "m{i}", "h{i}"),
                Residual("mlp.0.res", "m{i}", "x{i+1}"),
                *linear("mlp.3", "h{i}", "x{i+1}"),
            ),
        ),
        *norm("encoder.ln", "x{n}"),
        Neurons(("logits",)),
        *linear("heads.head", "x{n}", "logits", required=False),
    )


def _vit_clip(*, published: bool) -> tuple[Element, ...]:
    """Names of open_clip. The published graph takes norms in parameter order: each one after the layer it precedes."""
    ln_1, ln_2 = ("m{i}", "x{i+1}") if published else ("x{i}", "m{i}")
    return (
        Neurons(("x0",), fed_by=("channels", "positions")),
        Vector("class_embedding", TOKEN, "x0", label="class_embedding.weight"),
        embedding(
            "positional_embedding",
            POSITION,
            "positions",
            label="positional_embedding.weight",
            transposed=published,
        ),
        Weight("proj", LINEAR, "x{n}", "embedding", "st", label="proj.weight", required=False),
        Weight("conv1.weight", CONV, "channels", "x0"),
        *norm("ln_pre", "x0"),
        Stack(
            "transformer.resblocks.*.",
            (
                *LAYER,
                *fused_attention(
                    "attn.in_proj_weight", "attn.in_proj_bias", "attn.in_proj_", transposed=False, published=published
                ),
                *linear("attn.out_proj", "v{i}", "m{i}"),
                *norm("ln_1", ln_1),
                *linear("mlp.c_fc", "m{i}", "h{i}"),
                Residual("mlp.c_fc.res", "m{i}", "x{i+1}"),
                *linear("mlp.c_proj", "h{i}", "x{i+1}"),
                *norm("ln_2", ln_2),
            ),
        ),
        *norm("ln_post", "x{n}"),
        Neurons(("embedding",)),
    )


def _vit_hf() -> Callable[[ArchitectureSpec], Expansion]:
    """Names of current transformers, and the ones before its fifth version."""
    old = attention("attention.", "attention.query", "attention.key", "attention.value", "output.dense")
    new = attention("attention.", "q_proj", "k_proj", "v_proj", "o_proj")

    def stack(find: str, attention: tuple[Element, ...], first: str, second: str) -> Stack:
        return Stack(
            find,
            (
                *FAITHFUL_LAYER,
                *norm("layernorm_before", "x{i}"),
                *attention,
                *norm("layernorm_after", "m{i}"),
                *linear(first, "m{i}", "h{i}"),
                Residual(f"{first}.res", "m{i}", "x{i+1}"),
                *linear(second, "h{i}", "x{i+1}"),
            ),
        )

    def table(spec: ArchitectureSpec) -> Expansion:
        before = any(".attention.attention.query." in name for name in spec.shapes())
        layers = (
            stack("encoder.layer.*.", old, "intermediate.dense", "output.dense")
            if before
            else stack("layers.*.", new, "mlp.fc1", "mlp.fc2")
        )
        return Expansion(
            (
                Neurons(("x0",), fed_by=("channels", "positions")),
                Vector("embeddings.cls_token", TOKEN, "x0"),
                embedding("embeddings.position_embeddings", POSITION, "positions"),
                Weight("embeddings.patch_embeddings.projection.weight", CONV, "channels", "x0"),
                Vector("embeddings.patch_embeddings.projection.bias", OTHER, "x0"),
                layers,
                *norm("layernorm", "x{n}"),
                Neurons(("pooled",)),
                *linear("pooler.dense", "x{n}", "pooled", required=False),
                Neurons(("labels",)),
                *linear("classifier", "x{n}", "labels", required=False),
            ),
            {},
        )

    return table


FAMILIES = (
    Family("vit", {"published": _vit(published=True), "faithful": _vit(published=False)}),
    Family("vit_clip", {"published": _vit_clip(published=True), "faithful": _vit_clip(published=False)}, ("visual.",)),
    Family("vit_hf", {"faithful": _vit_hf()}, ("vit.",)),
)
