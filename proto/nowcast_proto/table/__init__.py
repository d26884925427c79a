"""Tables: how the tensors of an architecture connect its neurons, said once for networks of every depth and width.

Families are tables the service knows; anybody may declare one as a JSON document (`DeclaredTable`). Either is written
out for one network by `wire`; a declared one by the client, so that what travels is the wiring itself (`wired_spec`).
"""

from nowcast_proto.table.document import MAX_DEPTH, DeclaredTable
from nowcast_proto.table.elements import MAX_ELEMENTS
from nowcast_proto.table.emit import PlacedBlock, PlacedRange, Wired, wire
from nowcast_proto.table.expand import Network
from nowcast_proto.table.explicit import fixed_ranges, wired_spec

__all__ = [
    "MAX_DEPTH",
    "MAX_ELEMENTS",
    "DeclaredTable",
    "Network",
    "PlacedBlock",
    "PlacedRange",
    "Wired",
    "fixed_ranges",
    "wire",
    "wired_spec",
]
