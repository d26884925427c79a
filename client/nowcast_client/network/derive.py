"""A live module becomes an `ArchitectureSpec`: traced from an example of its inputs, or known by its names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.table import DeclaredTable

from nowcast_client.network.modules import Example, Module
from nowcast_client.network.named import named_spec


def derive_spec(
    model: Module,
    *,
    example: Example | None = None,
    include_frozen: bool = False,
    table: DeclaredTable | str | Path | None = None,
    unknown: Literal["refuse", "edgewise"] = "refuse",
) -> ArchitectureSpec:
    """The spec of a live module.

    With an example of its inputs any network is taken: one forward pass is traced, the wiring that comes of it is
    proven on the live weights, and the spec carries it. A network of a family with published wiring keeps that where
    the trace agrees with it. Without an example only names and shapes can tell, and only known families are taken.

    Args:
        model: A ``torch.nn.Module``; wrappers around it are looked through.
        example: (positional, keyword) inputs of one forward pass; what a trace is made of.
        include_frozen: Also list parameters that do not require gradients.
        table: How to wire the network, where no family does: a `DeclaredTable` or the path of its JSON document.
        unknown: What becomes of a network no family fits: ``refuse`` it, or give it the family ``unknown``, which
            predictors that need no graph take (``linear``, for one).

    Raises:
        UnsupportedArchitecture: No family fits; the message says what was seen and what to pass instead.
        InvalidSpec: The table is malformed.
        UnreadableFile: The table cannot be read.
    """
    if example is not None and table is None:
        from nowcast_client.network.wired import wire  # needs torch

        return wire(model, *example, include_frozen=include_frozen).spec
    return named_spec(model, include_frozen=include_frozen, table=table, unknown=unknown)
