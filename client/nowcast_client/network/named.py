"""A live module becomes an `ArchitectureSpec` by names, shapes and config attributes, importing no model library.

The family is read off the parameters' names and the config's ``model_type``, heads off the config (or the attention
modules themselves). A module that matches no family is only called ``sequential`` where its layers really form a plain
chain. Anything else is refused with the reason, because a wrong graph would be silent; a table of your own wires it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from nowcast_proto.errors import UnsupportedArchitecture
from nowcast_proto.spec import ArchitectureSpec, ParameterSpec, Wiring
from nowcast_proto.table import DeclaredTable, wired_spec

from nowcast_client.network.chains import chain_of
from nowcast_client.network.modules import Module, plain_name, tensors_of, unwrapped
from nowcast_client.network.recognise import RULES, heads_of, recognise, told_type

UNKNOWN_FAMILY = "unknown"
"""Family of a network nothing is known of: for predictors that need no graph."""


def named_spec(
    model: Module,
    *,
    include_frozen: bool = False,
    table: DeclaredTable | str | Path | None = None,
    unknown: Literal["refuse", "edgewise"] = "refuse",
) -> ArchitectureSpec:
    """The spec as names, shapes and the config tell it; see `derive_spec`."""
    bare = unwrapped(model)
    config = getattr(bare, "config", None)
    shapes, frozen, ties = tensors_of(model)
    if isinstance(table, str | Path):
        table = DeclaredTable.read(table)
    heads: dict[str, int] = {}
    wiring: Wiring | None = None
    fixed: str | None = None
    if table is not None:
        family = table.family
        if table.needs_heads:
            heads = _known_heads(bare, config, family)
    elif rule := recognise(shapes, config):
        family, fixed = rule.family, rule.fixed
        if rule.heads:
            heads = _known_heads(bare, config, family)
    else:
        chain = chain_of(bare, shapes, plain_name)
        family, wiring = "sequential", chain.wiring
        if chain.problem and unknown == "edgewise":
            family = UNKNOWN_FAMILY
        elif chain.problem:
            raise _unknown(bare, config, shapes, chain.problem)
    left_out = [] if include_frozen else [name for name in frozen if fixed is None or not re.search(fixed, name)]
    if left_out and family not in ("sequential", UNKNOWN_FAMILY):
        raise UnsupportedArchitecture(
            f"{len(left_out)} parameters are frozen (first: {left_out[0]!r}), and family {family!r} cannot be wired "
            "without them",
            expected="all parameters of the family",
            remedy="pass include_frozen=True: they then travel with every snapshot and are never patched",
        )
    for name in left_out:
        del shapes[name]
    spec = ArchitectureSpec(
        family=family,
        parameters=tuple(ParameterSpec(name=name, shape=shape) for name, shape in shapes.items()),
        ties={alias: name for alias, name in ties.items() if name in shapes},
        wiring=wiring,
        num_heads=heads.get("num_heads"),
        num_kv_heads=heads.get("num_kv_heads"),
        head_dim=heads.get("head_dim"),
    )
    # A table is written out here: what travels is the wiring itself.
    return spec if table is None else wired_spec(spec, table)


def _known_heads(bare: Any, config: Any, family: str) -> dict[str, int]:
    heads = heads_of((module for _, module in bare.named_modules()), config)
    if not heads:
        raise UnsupportedArchitecture(
            f"the number of attention heads of this {family} model is not to be found",
            expected="an attribute like 'num_attention_heads' or 'n_head' on model.config or on its attention modules",
            remedy="pass spec=ArchitectureSpec(...) with num_heads",
        )
    return heads


def _unknown(bare: Any, config: Any, shapes: dict[str, tuple[int, ...]], problem: str) -> UnsupportedArchitecture:
    names = list(shapes)
    kind = told_type(config)
    return UnsupportedArchitecture(
        f"no family fits a {type(bare).__name__}{f' of type {kind!r}' if kind else ''} whose tensors are called "
        + ", ".join(repr(name) for name in (*names[:3], *(["…"] if len(names) > 4 else []), *names[3:][-1:]))
        + f"; nor is it a plain chain of layers: {problem}",
        expected="a network of " + ", ".join(sorted({rule.family for rule in RULES})) + ", or a plain chain of linear, "
        "convolution and normalisation layers",
        remedy="pass spec=derive_spec(model, example=(args, kwargs)) with inputs of one forward pass: any network can "
        "be traced; or spec=derive_spec(model, table='your-table.json') to say how it is wired, "
        "spec=ArchitectureSpec(...) if you know the family that wires it, or spec=derive_spec(model, "
        "unknown='edgewise') with a predictor that needs no graph",
    )
