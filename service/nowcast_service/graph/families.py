"""The families, as data.

Published tables reproduce the node layout of the published NiNo graphs, with their departures from the networks' true
symmetries, because the trained weights know it. Faithful tables keep every permutation of neurons that keeps the
function. The order of the entries is the order of edges and of the nodes that 1-D tensors add.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from nowcast_proto.spec import ArchitectureSpec

from nowcast_service.graph import sequential
from nowcast_service.graph.blocks import EdgeType
from nowcast_service.graph.table import (
    Cut,
    Diagonal,
    Element,
    Expansion,
    Family,
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

LINEAR, OTHER, CONV, NORM = EdgeType.LINEAR, EdgeType.OTHER, EdgeType.CONV, EdgeType.NORM
TOKEN, POSITION = EdgeType.TOKEN_EMBEDDING, EdgeType.POSITION_EMBEDDING
QUERY, KEY, VALUE = EdgeType.QUERY, EdgeType.KEY, EdgeType.VALUE


def _norm(name: str, target: str) -> tuple[Element, ...]:
    """Weight and bias of a normalisation; either may be absent."""
    return (Vector(f"{name}.weight", NORM, target), Vector(f"{name}.bias", OTHER, target))


def _embedding(name: str, kind: EdgeType, rows: str, *, label: str | None = None, transposed: bool = False) -> Element:
    """Rows of a table to the first residual stream. Only the tokens' is required."""
    required = kind is TOKEN
    return Weight(name, kind, rows, "x0", "st", label, required=required, transposed=transposed)


def _linear(name: str, source: str, target: str, *, stored: str = "ts", required: bool = True) -> tuple[Element, ...]:
    """Weight and bias of a dense layer; the bias may be absent."""
    order = "st" if stored == "st" else "ts"
    return (
        Weight(f"{name}.weight", LINEAR, source, target, stored=order, required=required),
        Vector(f"{name}.bias", OTHER, target),
    )


def _fused_attention(
    weight: str, bias: str, label: str, *, transposed: bool, published: bool, rotary: bool = False
) -> tuple[Element, ...]:
    """Query, key and value fused in one tensor: (3 * inner, width), or (width, 3 * inner) where ``transposed``.

    Key weights run from head space to the input. The published key bias does the same and so lands on the stream;
    faithful wiring leaves it on the neurons it belongs to.
    """
    axis = 1 if transposed else 0
    forward, backward = ("st", "ts") if transposed else ("ts", "st")
    key_bias: Element
    if published:
        key_bias = Vector(bias, OTHER, "x{i}", label=f"{label}k.bias", cut=Cut(0, 1))
    else:
        key_bias = Vector(bias, OTHER, "q{i}", label=f"{label}k.bias", cut=Cut(0, 1), reverse=True)
    return (
        Weight(weight, QUERY, "x{i}", "q{i}", forward, f"{label}q.weight", Cut(axis, 0)),
        Heads(f"{label}q.head", "heads{i}", "q{i}", ordered=rotary),
        Vector(bias, OTHER, "q{i}", label=f"{label}q.bias", cut=Cut(0, 0)),
        Weight(weight, KEY, "q{i}", "x{i}", backward, f"{label}k.weight", Cut(axis, 1)),
        key_bias,
        Weight(weight, VALUE, "x{i}", "v{i}", forward, f"{label}v.weight", Cut(axis, 2)),
        Heads(f"{label}v.head", "heads{i}", "v{i}"),
        Vector(bias, OTHER, "v{i}", label=f"{label}v.bias", cut=Cut(0, 2)),
        Residual(f"{label}v.res", "x{i}", "m{i}"),
    )


_LAYER = (Neurons(("q{i}", "v{i}"), fed_by=("heads{i}",)), Neurons(("m{i}",)), Neurons(("h{i}",)), Neurons(("x{i+1}",)))
"""Layout of a transformer layer: q and v, the stream after attention, the hidden neurons, the stream after them."""


def _gpt2(*, published: bool) -> tuple[Element, ...]:
    return (
        Neurons(("x0",), fed_by=("tokens", "positions")),
        _embedding("wte.weight", TOKEN, "tokens"),
        _embedding("wpe.weight", POSITION, "positions"),
        Stack(
            r"h\.(\d+)\.",
            (
                *_LAYER,
                *_norm("ln_1", "x{i}"),
                *_fused_attention(
                    "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_attn.", transposed=True, published=published
                ),
                *_linear("attn.c_proj", "v{i}", "m{i}", stored="st"),
                *_norm("ln_2", "m{i}"),
                *_linear("mlp.c_fc", "m{i}", "h{i}", stored="st"),
                Residual("mlp.c_fc.res", "m{i}", "x{i+1}"),
                *_linear("mlp.c_proj", "h{i}", "x{i+1}", stored="st"),
            ),
        ),
        *_norm("ln_f", "x{n}"),
        Neurons(("logits",)),
        *_linear("lm_head", "x{n}", "logits", required=False),
    )


_LLAMA_PUBLISHED: tuple[Element, ...] = (
    Neurons(("x0",), fed_by=("tokens",)),
    _embedding("embed_tokens.weight", TOKEN, "tokens", transposed=True),
    Stack(
        r"layers\.(\d+)\.",
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


def _attention(prefix: str, query: str, key: str, value: str, out: str, *, rotary: bool = False) -> tuple[Element, ...]:
    """Faithful attention with separate tensors, any number of key and value heads.

    Query and key neurons are the same where every query head has its own key head, as are value and mixed neurons.
    Where heads share, each shared head has neurons of its own, linked one to one with those of the heads that use it.
    A node per query head ties its query neurons to its mixed value neurons. Everything of the keys runs backwards.
    """
    return (
        Same("k{i}", "q{i}", when="mha"),
        Same("z{i}", "v{i}", when="mha"),
        Weight(f"{prefix}{query}.weight", QUERY, "x{i}", "q{i}"),
        Heads(f"{prefix}{query}.head", "heads{i}", "q{i}", ordered=rotary),
        Vector(f"{prefix}{query}.bias", OTHER, "q{i}"),
        Weight(f"{prefix}{key}.weight", KEY, "k{i}", "x{i}", "st"),
        Vector(f"{prefix}{key}.bias", OTHER, "k{i}", reverse=True),
        Spread(f"{prefix}{key}.shared", "k{i}", "q{i}", fold=True),
        Weight(f"{prefix}{value}.weight", VALUE, "x{i}", "v{i}"),
        Vector(f"{prefix}{value}.bias", OTHER, "v{i}"),
        Spread(f"{prefix}{value}.shared", "v{i}", "z{i}"),
        Heads(f"{prefix}{value}.head", "heads{i}", "z{i}"),
        Residual(f"{prefix}{value}.res", "x{i}", "m{i}"),
        *_linear(f"{prefix}{out}", "z{i}", "m{i}"),
    )


_FAITHFUL_LAYER = (
    Neurons(("q{i}", "k{i}", "v{i}", "z{i}"), fed_by=("heads{i}", "q_norm{i}", "k_norm{i}")),
    Neurons(("m{i}",)),
    Neurons(("h{i}", "up{i}")),
    Neurons(("x{i+1}",)),
)
"""As `_LAYER`, with shared key and value heads (k, v), mixed values (z), norms over heads, and gated neurons (up)."""

_HEAD_NORMS: tuple[Element, ...] = (
    Vector("self_attn.q_norm.weight", NORM, "q_norm{i}"),
    Spread("self_attn.q_norm.shared", "q_norm{i}", "q{i}", few=1),
    Vector("self_attn.k_norm.weight", NORM, "k_norm{i}", reverse=True),
    Spread("self_attn.k_norm.shared", "k_norm{i}", "k{i}", few=1, many="K", fold=True),
)
"""One norm for all heads: a neuron per place in a head, linked to that place of every head."""

_GATED: tuple[Element, ...] = (
    *_linear("mlp.gate_proj", "m{i}", "h{i}"),
    *_linear("mlp.up_proj", "m{i}", "up{i}"),
    Residual("mlp.up_proj.pair", "up{i}", "h{i}"),
    Residual("mlp.gate_proj.res", "m{i}", "x{i+1}"),
    *_linear("mlp.down_proj", "h{i}", "x{i+1}"),
)
"""A gated feed-forward: gate and up neurons are told apart and paired one to one."""

_FUSED_GATED: tuple[Element, ...] = (
    Weight("mlp.gate_up_proj.weight", LINEAR, "m{i}", "h{i}", label="mlp.gate_proj.weight", cut=Cut(0, 0, (1, 1))),
    Weight("mlp.gate_up_proj.weight", LINEAR, "m{i}", "up{i}", label="mlp.up_proj.weight", cut=Cut(0, 1, (1, 1))),
    Residual("mlp.up_proj.pair", "up{i}", "h{i}"),
    Residual("mlp.gate_up_proj.res", "m{i}", "x{i+1}"),
    *_linear("mlp.down_proj", "h{i}", "x{i+1}"),
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
        _embedding("embed_tokens.weight", TOKEN, "tokens"),
        Stack(
            r"layers\.(\d+)\.",
            (
                *_FAITHFUL_LAYER,
                Vector("input_layernorm.weight", NORM, "x{i}"),
                *attention,
                *inner,
                *feed_forward,
                *outer,
            ),
        ),
        Vector("norm.weight", NORM, "x{n}"),
        Neurons(("logits",)),
        *_linear("lm_head", "x{n}", "logits", required=False),
    )


_SEPARATE = _attention("self_attn.", "q_proj", "k_proj", "v_proj", "o_proj", rotary=True)


def _shared_fused(weight: str, label: str, out: str) -> tuple[Element, ...]:
    """Faithful attention with query, key and value fused as H : K : K heads, one after another."""
    ratio = ("H", "K", "K")
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
        *_linear(out, "z{i}", "m{i}"),
    )


_LLAMA = _decoder(_SEPARATE, _GATED)
_QWEN3 = _decoder((*_SEPARATE, *_HEAD_NORMS), _GATED)
_GEMMA3 = _decoder((*_SEPARATE, *_HEAD_NORMS), _GATED, sandwich=True)
_PHI3 = _decoder(_shared_fused("self_attn.qkv_proj.weight", "self_attn.", "self_attn.o_proj"), _FUSED_GATED)


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
        *_linear("attention.dense", "v{i}", "x{i+1}"),
    )


_GPT_NEOX: Table = (
    Neurons(("x0",), fed_by=("tokens",)),
    _embedding("embed_in.weight", TOKEN, "tokens"),
    Stack(
        r"layers\.(\d+)\.",
        (
            Neurons(("q{i}", "v{i}", "h{i}"), fed_by=("heads{i}",)),
            Neurons(("x{i+1}",)),
            *_norm("input_layernorm", "x{i}"),
            *_neox_attention(),
            *_norm("post_attention_layernorm", "x{i}"),
            *_linear("mlp.dense_h_to_4h", "x{i}", "h{i}"),
            *_linear("mlp.dense_4h_to_h", "h{i}", "x{i+1}"),
        ),
    ),
    *_norm("final_layer_norm", "x{n}"),
    Neurons(("logits",)),
    Weight("embed_out.weight|lm_head.weight", LINEAR, "x{n}", "logits", required=False),
)
"""With parallel residuals, as in Pythia."""


def _masked_head(weight: str, *biases: str) -> tuple[Element, ...]:
    """Scores of a masked-token head, whose neurons are the stream's where it reads them with the token embedding."""
    return (
        *(Vector(bias, OTHER, "tokens", reverse=True) for bias in biases),
        Weight(weight, LINEAR, "transform", "tokens", required=False),
        Residual("transform.tied", "transform", "x{n}", given=biases[0], unless=weight),
    )


_MODERNBERT: Table = (
    Neurons(("x0",), fed_by=("tokens",)),
    _embedding("embeddings.tok_embeddings.weight", TOKEN, "tokens"),
    *_norm("embeddings.norm", "x0"),
    Stack(
        r"layers\.(\d+)\.",
        (
            Neurons(("q{i}", "v{i}"), fed_by=("heads{i}",)),
            Neurons(("m{i}",)),
            Neurons(("h{i}", "up{i}")),
            Neurons(("x{i+1}",)),
            *_norm("attn_norm", "x{i}"),
            *_fused_attention(
                "attn.Wqkv.weight", "attn.Wqkv.bias", "attn.", transposed=False, published=False, rotary=True
            ),
            *_linear("attn.Wo", "v{i}", "m{i}"),
            *_norm("mlp_norm", "m{i}"),
            Weight("mlp.Wi.weight", LINEAR, "m{i}", "h{i}", label="mlp.Wi.input.weight", cut=Cut(0, 0, (1, 1))),
            Weight("mlp.Wi.weight", LINEAR, "m{i}", "up{i}", label="mlp.Wi.gate.weight", cut=Cut(0, 1, (1, 1))),
            Residual("mlp.Wi.pair", "up{i}", "h{i}"),
            Residual("mlp.Wi.res", "m{i}", "x{i+1}"),
            *_linear("mlp.Wo", "h{i}", "x{i+1}"),
        ),
    ),
    *_norm("final_norm", "x{n}"),
    Neurons(("transform",)),
    *_linear("head.dense", "x{n}", "transform", required=False),
    *_norm("head.norm", "transform"),
    *_masked_head("decoder.weight", "decoder.bias"),
    Neurons(("labels",)),
    *_linear("classifier", "transform", "labels", required=False),
)


def _bert(*, published: bool) -> tuple[Element, ...]:
    query, key, value = (f"attention.self.{name}" for name in ("query", "key", "value"))
    return (
        Neurons(("x0",), fed_by=("tokens", "positions", "types")),
        _embedding("embeddings.word_embeddings.weight", TOKEN, "tokens", transposed=published),
        _embedding("embeddings.position_embeddings.weight", POSITION, "positions", transposed=published),
        _embedding("embeddings.token_type_embeddings.weight", OTHER, "types", transposed=published),
        *_norm("embeddings.LayerNorm", "x0"),
        Stack(
            r"encoder\.layer\.(\d+)\.",
            (
                *_LAYER,
                Weight(f"{query}.weight", QUERY, "x{i}", "q{i}"),
                Heads(f"{query}.head", "heads{i}", "q{i}"),
                Vector(f"{query}.bias", OTHER, "q{i}"),
                Weight(f"{key}.weight", KEY, "q{i}", "x{i}", "st"),
                Vector(f"{key}.bias", OTHER, "x{i}" if published else "q{i}", reverse=not published),
                Weight(f"{value}.weight", VALUE, "x{i}", "v{i}"),
                Heads(f"{value}.head", "heads{i}", "v{i}"),
                Vector(f"{value}.bias", OTHER, "v{i}"),
                Residual(f"{value}.res", "x{i}", "m{i}"),
                *_linear("attention.output.dense", "v{i}", "m{i}"),
                *_norm("attention.output.LayerNorm", "m{i}"),
                *_linear("intermediate.dense", "m{i}", "h{i}"),
                Residual("intermediate.dense.res", "m{i}", "x{i+1}"),
                *_linear("output.dense", "h{i}", "x{i+1}"),
                *_norm("output.LayerNorm", "x{i+1}"),
            ),
        ),
        *(
            (Vector("cls.predictions.bias|lm_head.bias", OTHER, "tokens", reverse=True),)
            if published
            else _masked_head(
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


def _vit(*, published: bool) -> tuple[Element, ...]:
    """Names of torchvision."""
    return (
        Neurons(("x0",), fed_by=("channels", "positions")),
        Vector("class_token", TOKEN, "x0", label="class_token.weight"),
        Weight("conv_proj.weight", CONV, "channels", "x0"),
        Vector("conv_proj.bias", OTHER, "x0"),
        _embedding(
            "encoder.pos_embedding",
            POSITION,
            "positions",
            label="encoder.pos_embedding.weight",
            transposed=published,
        ),
        Stack(
            r"encoder\.layers\.encoder_layer_(\d+)\.",
            (
                *_LAYER,
                *_norm("ln_1", "x{i}"),
                *_fused_attention(
                    "self_attention.in_proj_weight",
                    "self_attention.in_proj_bias",
                    "self_attention.in_proj_",
                    transposed=False,
                    published=published,
                ),
                *_linear("self_attention.out_proj", "v{i}", "m{i}"),
                *_norm("ln_2", "m{i}"),
                *_linear("mlp.0", "m{i}", "h{i}"),
                Residual("mlp.0.res", "m{i}", "x{i+1}"),
                *_linear("mlp.3", "h{i}", "x{i+1}"),
            ),
        ),
        *_norm("encoder.ln", "x{n}"),
        Neurons(("logits",)),
        *_linear("heads.head", "x{n}", "logits", required=False),
    )


def _vit_clip(*, published: bool) -> tuple[Element, ...]:
    """Names of open_clip. The published graph takes norms in parameter order: each one after the layer it precedes."""
    ln_1, ln_2 = ("m{i}", "x{i+1}") if published else ("x{i}", "m{i}")
    return (
        Neurons(("x0",), fed_by=("channels", "positions")),
        Vector("class_embedding", TOKEN, "x0", label="class_embedding.weight"),
        _embedding(
            "positional_embedding",
            POSITION,
            "positions",
            label="positional_embedding.weight",
            transposed=published,
        ),
        Weight("proj", LINEAR, "x{n}", "embedding", "st", label="proj.weight", required=False),
        Weight("conv1.weight", CONV, "channels", "x0"),
        *_norm("ln_pre", "x0"),
        Stack(
            r"transformer\.resblocks\.(\d+)\.",
            (
                *_LAYER,
                *_fused_attention(
                    "attn.in_proj_weight", "attn.in_proj_bias", "attn.in_proj_", transposed=False, published=published
                ),
                *_linear("attn.out_proj", "v{i}", "m{i}"),
                *_norm("ln_1", ln_1),
                *_linear("mlp.c_fc", "m{i}", "h{i}"),
                Residual("mlp.c_fc.res", "m{i}", "x{i+1}"),
                *_linear("mlp.c_proj", "h{i}", "x{i+1}"),
                *_norm("ln_2", ln_2),
            ),
        ),
        *_norm("ln_post", "x{n}"),
        Neurons(("embedding",)),
    )


def _vit_hf() -> Callable[[ArchitectureSpec], Expansion]:
    """Names of current transformers, and the ones before its fifth version."""
    old = _attention("attention.", "attention.query", "attention.key", "attention.value", "output.dense")
    new = _attention("attention.", "q_proj", "k_proj", "v_proj", "o_proj")

    def stack(find: str, attention: tuple[Element, ...], first: str, second: str) -> Stack:
        return Stack(
            find,
            (
                *_FAITHFUL_LAYER,
                *_norm("layernorm_before", "x{i}"),
                *attention,
                *_norm("layernorm_after", "m{i}"),
                *_linear(first, "m{i}", "h{i}"),
                Residual(f"{first}.res", "m{i}", "x{i+1}"),
                *_linear(second, "h{i}", "x{i+1}"),
            ),
        )

    def table(spec: ArchitectureSpec) -> Expansion:
        before = any(".attention.attention.query." in name for name in spec.shapes())
        layers = (
            stack(r"encoder\.layer\.(\d+)\.", old, "intermediate.dense", "output.dense")
            if before
            else stack(r"layers\.(\d+)\.", new, "mlp.fc1", "mlp.fc2")
        )
        return Expansion(
            (
                Neurons(("x0",), fed_by=("channels", "positions")),
                Vector("embeddings.cls_token", TOKEN, "x0"),
                _embedding("embeddings.position_embeddings", POSITION, "positions"),
                Weight("embeddings.patch_embeddings.projection.weight", CONV, "channels", "x0"),
                Vector("embeddings.patch_embeddings.projection.bias", OTHER, "x0"),
                layers,
                *_norm("layernorm", "x{n}"),
                Neurons(("pooled",)),
                *_linear("pooler.dense", "x{n}", "pooled", required=False),
                Neurons(("labels",)),
                *_linear("classifier", "x{n}", "labels", required=False),
            ),
            {},
        )

    return table


def _resnet(spec: ArchitectureSpec) -> Expansion:
    """Names of transformers or torchvision; a block has as many convolutions as it has, basic or bottleneck."""

    def block(find: str, shortcut: str, shortcut_norm: str, convolutions: Stack) -> Stack:
        return Stack(
            find,
            (
                Weight(f"{shortcut}.weight", CONV, "x{i}", "x{i+1}", required=False),
                *_norm(shortcut_norm, "x{i+1}"),
                Residual("res", "x{i}", "x{i+1}", unless=f"{shortcut}.weight"),
                convolutions,
                Neurons(("x{i+1}",)),
            ),
        )

    def convolutions(find: str, convolution: str, norm: str, *, relative: bool) -> Stack:
        return Stack(
            find,
            (
                Same("c{i}.0", "x{i}"),
                Same("c{i}.{m}", "x{i+1}"),
                Neurons(("c{i}.{c+1}",)),
                Weight(f"{convolution}.weight", CONV, "c{i}.{c}", "c{i}.{c+1}", grouped=True),
                *_norm(norm, "c{i}.{c+1}"),
            ),
            var="c",
            count="m",
            relative=relative,
        )

    if any(name.startswith("layer1.") for name in spec.shapes()):
        stem, stem_norm, head = "conv1", "bn1", "fc"
        blocks = block(
            r"layer(\d+)\.(\d+)\.",
            "downsample.0",
            "downsample.1",
            convolutions(r"conv(\d+)\.", "conv{c#}", "bn{c#}", relative=False),
        )
    else:
        stem, stem_norm, head = "embedder.embedder.convolution", "embedder.embedder.normalization", "classifier.1"
        blocks = block(
            r"encoder\.stages\.(\d+)\.layers\.(\d+)\.",
            "shortcut.convolution",
            "shortcut.normalization",
            convolutions(r"layer\.(\d+)\.", "convolution", "normalization", relative=True),
        )
    return Expansion(
        (
            Neurons(("x0",), fed_by=("channels",)),
            Weight(f"{stem}.weight", CONV, "channels", "x0"),
            *_norm(stem_norm, "x0"),
            blocks,
            Neurons(("labels",)),
            *_linear(head, "x{n}", "labels", required=False),
        ),
        {},
    )


_CONVNEXT: Table = (
    Neurons(("x0",), fed_by=("channels",)),
    Weight("embeddings.patch_embeddings.weight", CONV, "channels", "x0"),
    Vector("embeddings.patch_embeddings.bias", OTHER, "x0"),
    *_norm("embeddings.layernorm", "x0"),
    Stack(
        r"encoder\.stages\.(\d+)\.",
        (
            # b{i}.0 is the stage's input: what the stage before gave, through the downsampling where there is one.
            Same("b{i}.0", "x{i}", unless="downsampling_layer.1.weight"),
            *_norm("downsampling_layer.0", "x{i}"),
            Weight("downsampling_layer.1.weight", CONV, "x{i}", "b{i}.0", required=False),
            Vector("downsampling_layer.1.bias", OTHER, "b{i}.0"),
            Neurons(("b{i}.0",)),
            Stack(
                r"layers\.(\d+)\.",
                (
                    Same("b{i}.{m}", "x{i+1}"),
                    Neurons(("d{i}.{b}",)),
                    Neurons(("h{i}.{b}",)),
                    Neurons(("b{i}.{b+1}",)),
                    Weight("dwconv.weight", CONV, "b{i}.{b}", "d{i}.{b}", grouped=True),
                    Vector("dwconv.bias", OTHER, "d{i}.{b}"),
                    *_norm("layernorm", "d{i}.{b}"),
                    *_linear("pwconv1", "d{i}.{b}", "h{i}.{b}"),
                    *_linear("pwconv2", "h{i}.{b}", "b{i}.{b+1}"),
                    Vector("layer_scale_parameter", NORM, "b{i}.{b+1}"),
                    Residual("res", "b{i}.{b}", "b{i}.{b+1}"),
                ),
                var="b",
                count="m",
            ),
            Neurons(("x{i+1}",)),
        ),
    ),
    *_norm("layernorm", "x{n}"),
    Neurons(("labels",)),
    *_linear("classifier", "x{n}", "labels", required=False),
)


def _nanogpt(spec: ArchitectureSpec) -> Expansion:
    """The names of GPT-2 with `torch.nn.Linear` layers, query, key and value fused or apart; value embeddings.

    A model without a table of positions is taken to turn queries and keys by theirs. Scalars such as the lambdas of
    residuals and value embeddings belong to no neuron.
    """
    names = spec.shapes()
    rotary = not any(name.endswith("wpe.weight") for name in names)
    attention = (
        _attention("attn.", "c_q", "c_k", "c_v", "c_proj", rotary=rotary)
        if any(name.endswith(".attn.c_q.weight") for name in names)
        else (
            *_fused_attention(
                "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_attn.",
                transposed=False, published=False, rotary=rotary,
            ),
            *_linear("attn.c_proj", "v{i}", "m{i}"),
        )
    )  # fmt: skip
    values, unplaced = _value_embeddings(list(names))
    return Expansion(
        (
            Neurons(("x0",), fed_by=("tokens", "positions")),
            _embedding("wte.weight", TOKEN, "tokens"),
            _embedding("wpe.weight", POSITION, "positions"),
            Stack(
                r"h\.(\d+)\.",
                (
                    *_FAITHFUL_LAYER,
                    *_norm("ln_1", "x{i}"),
                    *attention,
                    *_norm("ln_2", "m{i}"),
                    *_linear("mlp.c_fc", "m{i}", "h{i}"),
                    Residual("mlp.c_fc.res", "m{i}", "x{i+1}"),
                    *_linear("mlp.c_proj", "h{i}", "x{i+1}"),
                ),
            ),
            *values,
            *_norm("ln_f", "x{n}"),
            Neurons(("logits",)),
            *_linear("lm_head", "x{n}", "logits", required=False),
        ),
        unplaced,
    )


def _value_embeddings(names: list[str]) -> tuple[tuple[Element, ...], dict[str, str]]:
    """Tables from tokens to the value neurons of the layer they are numbered after."""
    found = {name: int(m.group(1)) for name in names if (m := re.search(r"(?:^|\.)value_embeds\.(\d+)\.weight$", name))}
    layers = {int(m.group(1)) for name in names if (m := re.match(r"(?:transformer\.)?h\.(\d+)\.", name))}
    given = set(found.values())
    if not given <= layers or (given != layers and given == set(range(len(given)))):
        # Numbered 0, 1, 2 for a deeper network, they are shared by layers in a way that names do not tell.
        reason = f"{len(given)} value embeddings for {len(layers)} layers: which layers read it is not in its name"
        return (), dict.fromkeys(found, reason)
    table = Weight("weight", TOKEN, "tokens", "v{e#}", "st")
    return (Stack(r"value_embeds\.(\d+)\.", (table,), var="e", count="values", required=False),), {}


def _attend(
    names: tuple[str, str, str, str], reads: str, memory: str, ends: tuple[str, str, str], heads: str
) -> tuple[Element, ...]:
    """Faithful attention of one stream to another (or to itself), each head with its own key head.

    Args:
        names: Query, key, value and output layers.
        reads: Range of the stream that asks.
        memory: Range of the stream that is asked.
        ends: Ranges of query neurons, value neurons, and of the stream afterwards.
        heads: Range of the head nodes; layers that share one have their heads in one order.
    """
    (query, key, value, out), (q, v, after) = names, ends
    return (
        Weight(f"{query}.weight", QUERY, reads, q),
        Heads(f"{query}.head", heads, q),
        Vector(f"{query}.bias", OTHER, q),
        Weight(f"{key}.weight", KEY, q, memory, "st"),
        Vector(f"{key}.bias", OTHER, q, reverse=True),
        Weight(f"{value}.weight", VALUE, memory, v),
        Heads(f"{value}.head", heads, v),
        Vector(f"{value}.bias", OTHER, v),
        Residual(f"{value}.res", reads, after),
        *_linear(out, v, after),
    )


def _t5() -> Table:
    """Encoder x, decoder y. One table of relative positions serves all layers, so their heads keep one order."""

    def attention(name: str, reads: str, memory: str, ends: tuple[str, str, str], heads: str) -> tuple[Element, ...]:
        names = (f"{name}.q", f"{name}.k", f"{name}.v", f"{name}.o")
        return _attend(names, reads, memory, ends, heads)

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
            r"encoder\.block\.(\d+)\.",
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
            r"decoder\.block\.(\d+)\.",
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
        *_linear("classification_head.dense", "y{m}", "pooled", required=False),
        Neurons(("logits",)),
        Weight("lm_head.weight", LINEAR, "y{m}", "logits", required=False),
        *_linear("classification_head.out_proj", "pooled", "logits", required=False),
        *_linear("classifier", "x{n}", "logits", required=False),
    )


def _whisper() -> Table:
    """Encoder x behind two convolutions over time, decoder y. The encoder's positions never train."""

    def attention(name: str, reads: str, memory: str, ends: tuple[str, str, str], heads: str) -> tuple[Element, ...]:
        names = (f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj", f"{name}.out_proj")
        return (*_norm(f"{name}_layer_norm", reads), *_attend(names, reads, memory, ends, heads))

    def feed_forward(reads: str, hidden: str, after: str) -> tuple[Element, ...]:
        return (
            *_norm("final_layer_norm", reads),
            *_linear("fc1", reads, hidden),
            Residual("fc1.res", reads, after),
            *_linear("fc2", hidden, after),
        )

    return (
        Neurons(("y0",), fed_by=("tokens", "positions")),
        Weight("decoder.embed_tokens.weight", TOKEN, "tokens", "y0", "st", required=False),
        Weight("decoder.embed_positions.weight", POSITION, "positions", "y0", "st", required=False),
        Neurons(("stem",), fed_by=("mels",)),
        Weight("encoder.conv1.weight", CONV, "mels", "stem"),
        Vector("encoder.conv1.bias", OTHER, "stem"),
        Neurons(("x0",), fed_by=("times",)),
        Weight("encoder.conv2.weight", CONV, "stem", "x0"),
        Vector("encoder.conv2.bias", OTHER, "x0"),
        Weight("encoder.embed_positions.weight", POSITION, "times", "x0", "st", required=False),
        Stack(
            r"encoder\.layers\.(\d+)\.",
            (
                *_LAYER,
                *attention("self_attn", "x{i}", "x{i}", ("q{i}", "v{i}", "m{i}"), "heads{i}"),
                *feed_forward("m{i}", "h{i}", "x{i+1}"),
            ),
        ),
        *_norm("encoder.layer_norm", "x{n}"),
        Stack(
            r"decoder\.layers\.(\d+)\.",
            (
                Neurons(("dq{j}", "dv{j}"), fed_by=("dheads{j}",)),
                Neurons(("s{j}",)),
                Neurons(("cq{j}", "cv{j}"), fed_by=("cheads{j}",)),
                Neurons(("c{j}",)),
                Neurons(("dh{j}",)),
                Neurons(("y{j+1}",)),
                *attention("self_attn", "y{j}", "y{j}", ("dq{j}", "dv{j}", "s{j}"), "dheads{j}"),
                *attention("encoder_attn", "s{j}", "x{n}", ("cq{j}", "cv{j}", "c{j}"), "cheads{j}"),
                *feed_forward("c{j}", "dh{j}", "y{j+1}"),
            ),
            var="j",
            count="m",
            required=False,
        ),
        *_norm("decoder.layer_norm", "y{m}"),
        Neurons(("projected",)),
        *_linear("projector", "x{n}", "projected", required=False),
        Neurons(("logits",)),
        Weight("proj_out.weight", LINEAR, "y{m}", "logits", required=False),
        *_linear("classifier", "projected", "logits", required=False),
    )


_FAMILIES = (
    Family("sequential", {"published": sequential.published, "faithful": sequential.faithful}, heads=False),
    Family("gpt2", {"published": _gpt2(published=True), "faithful": _gpt2(published=False)}, ("transformer.",)),
    Family("llama", {"published": _LLAMA_PUBLISHED, "faithful": _LLAMA}, ("model.",)),
    Family("qwen3", {"published": _LLAMA_PUBLISHED, "faithful": _QWEN3}, ("model.",)),
    Family("bert", {"published": _bert(published=True), "faithful": _bert(published=False)}, ("bert.",)),
    Family("vit", {"published": _vit(published=True), "faithful": _vit(published=False)}),
    Family("vit_clip", {"published": _vit_clip(published=True), "faithful": _vit_clip(published=False)}, ("visual.",)),
    Family("mistral", {"faithful": _LLAMA}, ("model.",)),
    Family("qwen2", {"faithful": _LLAMA}, ("model.",)),
    Family("gemma3", {"faithful": _GEMMA3}, ("model.",)),
    Family("phi3", {"faithful": _PHI3}, ("model.",)),
    Family("gpt_neox", {"faithful": _GPT_NEOX}, ("gpt_neox.",)),
    Family("nanogpt", {"faithful": _nanogpt}, ("transformer.",)),
    Family("roberta", {"faithful": _bert(published=False)}, ("roberta.",)),
    Family("modernbert", {"faithful": _MODERNBERT}, ("model.",)),
    Family("vit_hf", {"faithful": _vit_hf()}, ("vit.",)),
    Family("resnet", {"faithful": _resnet}, ("resnet.",), heads=False),
    Family("convnext", {"faithful": _CONVNEXT}, ("convnext.",), heads=False),
    Family("t5", {"faithful": _t5()}, ("transformer.",)),
    Family("whisper", {"faithful": _whisper()}, ("model.",)),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}
"""Every known family by name. Add a `Family` to teach the builder another architecture."""
