"""Whisper of transformers."""

from __future__ import annotations

from nowcast_proto.table.elements import Element, Neurons, Residual, Stack, Table, Vector, Weight

from nowcast_service.graph.families.family import Family
from nowcast_service.graph.families.parts import (
    CONV,
    LAYER,
    LINEAR,
    OTHER,
    POSITION,
    TOKEN,
    attend,
    linear,
    norm,
)


def _whisper() -> Table:
    """Encoder x behind two convolutions over time, decoder y. The encoder's positions never train."""

    def attention(name: str, reads: str, memory: str, ends: tuple[str, str, str], heads: str) -> tuple[Element, ...]:
        names = (f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj", f"{name}.out_proj")
        return (*norm(f"{name}_layer_norm", reads), *attend(names, reads, memory, ends, heads))

    def feed_forward(reads: str, hidden: str, after: str) -> tuple[Element, ...]:
        return (
            *norm("final_layer_norm", reads),
            *linear("fc1", reads, hidden),
            Residual("fc1.res", reads, after),
            *linear("fc2", hidden, after),
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
            "encoder.layers.*.",
            (
                *LAYER,
                *attention("self_attn", "x{i}", "x{i}", ("q{i}", "v{i}", "m{i}"), "heads{i}"),
                *feed_forward("m{i}", "h{i}", "x{i+1}"),
            ),
        ),
        *norm("encoder.layer_norm", "x{n}"),
        Stack(
            "decoder.layers.*.",
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
        *norm("decoder.layer_norm", "y{m}"),
        Neurons(("projected",)),
        *linear("projector", "x{n}", "projected", required=False),
        Neurons(("logits",)),
        Weight("proj_out.weight", LINEAR, "y{m}", "logits", required=False),
        *linear("classifier", "projected", "logits", required=False),
    )


FAMILIES = (Family("whisper", {"faithful": _whisper()}, ("model.",)),)
