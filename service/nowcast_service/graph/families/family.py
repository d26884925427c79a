"""What a family is: a name, and a table for each wiring it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nowcast_proto.spec import ArchitectureSpec, Wiring
from nowcast_proto.table.elements import Table


@dataclass(frozen=True, slots=True)
class Expansion:
    """A table written for one spec, with the tensors it could not place and why."""

    elements: Table
    unplaced: dict[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """How the tensors of one family connect neurons.

    Attributes:
        name: As in `ArchitectureSpec.family`.
        wirings: Wiring -> table, or a function that writes the table for one spec; the first is the default.
        roots: Optional name prefixes of the whole network.
        heads: The spec must say how many attention heads there are.
    """

    name: str
    wirings: dict[Wiring, Table | Callable[[ArchitectureSpec], Expansion]]
    roots: tuple[str, ...] = ()
    heads: bool = True
