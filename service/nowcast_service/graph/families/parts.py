"""What several families have in common: names of layers, faithful attention, the layout of a transformer layer."""

from __future__ import annotations

from typing import Literal

from nowcast_proto.table.elements import Cut, Element, Heads, Neurons, Residual, Same, Spread, Stored, Vector, Weight
from nowcast_proto.wiring import WeightKind

LINEAR: WeightKind = "linear"
OTHER: WeightKind = "other"
CONV: WeightKind = "conv"
NORM: WeightKind = "norm"
TOKEN: WeightKind = "token_embedding"
POSITION: WeightKind = "position_embedding"
QUERY: WeightKind = "query"
KEY: WeightKind = "key"
VALUE: WeightKind = "value"


def norm(name: str, target: str) -> tuple[Element, ...]:
    """Weight and bias of a normalisation; either may be absent."""
    return (Vector(f"{name}.weight", NORM, target), Vector(f"{name}.bias", OTHER, target))


def embedding(name: str, kind: WeightKind, rows: str, *, label: str | None = None, transposed: bool = False) -> Element:
    """Rows of a table to the first residual stream. Only the tokens' is required."""
    required = kind == TOKEN
    return Weight(name, kind, rows, "x0", "st", label, required=required, transposed=transposed)


def linear(name: str, source: str, target: str, *, stored: Stored = "ts", required: bool = True) -> tuple[Element, ...]:
    """Weight and bias of a dense layer; the bias may be absent."""
    return (
        Weight(f"{name}.weight", LINEAR, source, target, stored=stored, required=required),
        Vector(f"{name}.bias", OTHER, target),
    )


def fused_attention(
    weight: str, bias: str, label: str, *, transposed: bool, published: bool, rotary: bool = False
) -> tuple[Element, ...]:
    """Query, key and value fused in one tensor: (3 * inner, width), or (width, 3 * inner) where ``transposed``.

    Key weights run from head space to the input. The published key bias does the same and so lands on the stream;
    faithful wiring leaves it on the neurons it belongs to.
    """
    axis: Literal[0, 1] = 1 if transposed else 0
    forward: Stored = "st" if transposed else "ts"
    backward: Stored = "ts" if transposed else "st"
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


LAYER = (Neurons(("q{i}", "v{i}"), fed_by=("heads{i}",)), Neurons(("m{i}",)), Neurons(("h{i}",)), Neurons(("x{i+1}",)))
"""Layout of a transformer layer: q and v, the stream after attention, the hidden neurons, the stream after them."""


def attention(prefix: str, query: str, key: str, value: str, out: str, *, rotary: bool = False) -> tuple[Element, ...]:
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
        *linear(f"{prefix}{out}", "z{i}", "m{i}"),
    )


FAITHFUL_LAYER = (
    Neurons(("q{i}", "k{i}", "v{i}", "z{i}"), fed_by=("heads{i}", "q_norm{i}", "k_norm{i}")),
    Neurons(("m{i}",)),
    Neurons(("h{i}", "up{i}")),
    Neurons(("x{i+1}",)),
)
"""As `_LAYER`, with shared key and value heads (k, v), mixed values (z), norms over heads, and gated neurons (up)."""


def masked_head(weight: str, *biases: str) -> tuple[Element, ...]:
    """Scores of a masked-token head, whose neurons are the stream's where it reads them with the token embedding."""
    return (
        *(Vector(bias, OTHER, "tokens", reverse=True) for bias in biases),
        Weight(weight, LINEAR, "transform", "tokens", required=False),
        Residual("transform.tied", "transform", "x{n}", given=biases[0], unless=weight),
    )


def attend(
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
        *linear(out, v, after),
    )
