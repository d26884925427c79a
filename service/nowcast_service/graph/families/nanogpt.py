"""nanoGPT and its descendants."""

from __future__ import annotations

import re

from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.table.elements import Element, Neurons, Residual, Stack, Weight

from nowcast_service.graph.families.family import Expansion, Family
from nowcast_service.graph.families.parts import (
    FAITHFUL_LAYER,
    POSITION,
    TOKEN,
    attention,
    embedding,
    fused_attention,
    linear,
    norm,
)


def _nanogpt(spec: ArchitectureSpec) -> Expansion:
    """The names of GPT-2 with `torch.nn.Linear` layers, query, key and value fused or apart; value embeddings.

    A model without a table of positions is taken to turn queries and keys by theirs. Scalars such as the lambdas of
    residuals and value embeddings belong to no neuron.
    """
    names = spec.shapes()
    rotary = not any(name.endswith("wpe.weight") for name in names)
    attended = (
        attention("attn.", "c_q", "c_k", "c_v", "c_proj", rotary=rotary)
        if any(name.endswith(".attn.c_q.weight") for name in names)
        else (
            *fused_attention(
                "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_attn.",
                transposed=False, published=False, rotary=rotary,
            ),
            *linear("attn.c_proj", "v{i}", "m{i}"),
        )
    )  # fmt: skip
    values, unplaced = _value_embeddings(list(names))
    return Expansion(
        (
            Neurons(("x0",), fed_by=("tokens", "positions")),
            embedding("wte.weight", TOKEN, "tokens"),
            embedding("wpe.weight", POSITION, "positions"),
            Stack(
                "h.*.",
                (
                    *FAITHFUL_LAYER,
                    *norm("ln_1", "x{i}"),
                    *attended,
                    *norm("ln_2", "m{i}"),
                    *linear("mlp.c_fc", "m{i}", "h{i}"),
                    Residual("mlp.c_fc.res", "m{i}", "x{i+1}"),
                    *linear("mlp.c_proj", "h{i}", "x{i+1}"),
                ),
            ),
            *values,
            *norm("ln_f", "x{n}"),
            Neurons(("logits",)),
            *linear("lm_head", "x{n}", "logits", required=False),
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
    return (Stack("value_embeds.*.", (table,), var="e", count="values", required=False),), {}


FAMILIES = (Family("nanogpt", {"faithful": _nanogpt}, ("transformer.",)),)
