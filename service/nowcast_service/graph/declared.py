"""A table that came with the spec, as JSON, becomes a `Family` like those of `families.py`."""

from __future__ import annotations

import re

from nowcast_proto import table as declared
from nowcast_proto.errors import InvalidSpec
from nowcast_proto.spec import ArchitectureSpec

from nowcast_service.graph.blocks import EdgeType
from nowcast_service.graph.table import (
    Cut,
    Diagonal,
    Element,
    Family,
    Heads,
    Neurons,
    Residual,
    Same,
    Spread,
    Stack,
    Vector,
    Weight,
)

MAX_WORK = 5_000_000
"""Cap on elements times parameters: a table may not make a small spec expensive to build."""


def declared_family(spec: ArchitectureSpec) -> Family:
    """The family of a spec that carries a table; its wiring is ``faithful``, whatever it promises.

    Raises:
        InvalidSpec: There is no table, or table and spec are too large together.
    """
    if spec.table is None:
        raise InvalidSpec("the spec carries no table", expected="a spec with a table of its own")
    if spec.table.size * len(spec.parameters) > MAX_WORK:
        raise InvalidSpec(
            f"a table of {spec.table.size} elements for {len(spec.parameters)} parameters",
            expected=f"at most {MAX_WORK} as their product",
        )
    elements = tuple(_element(entry) for entry in spec.table.elements)
    return Family(spec.table.family, {"faithful": elements}, spec.table.roots, heads=spec.table.needs_heads)


def _element(entry: declared.Entry) -> Element:
    match entry:
        case declared.NeuronsEntry():
            return Neurons(entry.ranges, entry.fed_by)
        case declared.SameEntry():
            return Same(entry.alias, entry.range, entry.when, entry.unless)
        case declared.WeightEntry():
            return Weight(
                entry.tensor,
                EdgeType[entry.type.upper()],
                entry.source,
                entry.target,
                entry.stored,
                entry.label,
                _cut(entry.cut),
                entry.required,
                entry.grouped,
            )
        case declared.VectorEntry():
            return Vector(
                entry.tensor,
                EdgeType[entry.type.upper()],
                entry.target,
                entry.label,
                _cut(entry.cut),
                entry.reverse,
                entry.required,
            )
        case declared.DiagonalEntry():
            kind = EdgeType[entry.type.upper()]
            return Diagonal(entry.tensor, kind, entry.source, entry.target, entry.label, entry.required)
        case declared.HeadsEntry():
            return Heads(entry.label, entry.heads, entry.target, entry.count, entry.ordered)
        case declared.ResidualEntry():
            return Residual(entry.label, entry.source, entry.target, entry.unless, entry.given)
        case declared.SpreadEntry():
            return Spread(entry.label, entry.source, entry.target, entry.few, entry.many, entry.fold)
        case declared.StackEntry():
            return Stack(
                r"(\d+)".join(re.escape(part) for part in entry.find.split("*")),
                tuple(_element(inner) for inner in entry.elements),
                entry.var,
                entry.count,
                entry.relative,
                entry.required,
            )


def _cut(entry: declared.CutEntry | None) -> Cut | None:
    return None if entry is None else Cut(entry.axis, entry.index, entry.ratio, entry.per_head)
