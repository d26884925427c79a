"""What the service and the process that works on specs say to each other.

Over one socket go a letter and a number: ``S`` starts that number on the socket sent along, ``E`` ends it. On that
socket a child reads the order (length, msgpack), answers one byte ``S`` when it has begun, then ``R`` and the result or
``X`` and an error body; where the child ended without a word, ``K`` and the signal that ended it. Graphs travel as
msgpack of their fields: no pickle, although both ends are ours.
"""

from __future__ import annotations

import dataclasses
import struct
from enum import IntEnum
from typing import Any

import msgpack  # type: ignore[import-untyped]
from nowcast_proto.spec import ArchitectureSpec

from nowcast_service.graph.blocks import Block, Coverage, EdgeType, NeuralGraph, Range, View
from nowcast_service.predictors.graphs import Needs

ORDER = struct.Struct("<cQ")
LENGTH = struct.Struct("<Q")
_RECORDS: tuple[type, ...] = (NeuralGraph, Block, View, Coverage, Range)
_ENUMS: tuple[type[IntEnum], ...] = (EdgeType,)


def portable(value: Any) -> Any:
    """A graph, or a part of one, as nested lists; the spec, which both ends have, is left out."""
    if isinstance(value, IntEnum):
        return ["e", _ENUMS.index(type(value)), int(value)]
    if isinstance(value, tuple | list):
        return ["t", *map(portable, value)]
    if dataclasses.is_dataclass(value):
        fields = [getattr(value, f.name) for f in dataclasses.fields(value) if f.init and f.name != "spec"]
        return ["r", _RECORDS.index(type(value)), *map(portable, fields)]
    return value


def restored(value: Any, spec: ArchitectureSpec) -> Any:
    """What `portable` took apart, of this spec."""
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "t":
        return tuple(restored(item, spec) for item in rest)
    if kind == "e":
        return _ENUMS[rest[0]](rest[1])
    record = _RECORDS[rest[0]]
    names = [f.name for f in dataclasses.fields(record) if f.init and f.name != "spec"]
    fields = {name: restored(item, spec) for name, item in zip(names, rest[1:], strict=True)}
    return record(spec=spec, **fields) if record is NeuralGraph else record(**fields)


def order_of(spec: ArchitectureSpec, needs: Needs, *, whole: bool, seconds: float, memory: int) -> bytes:
    """An order as it is sent.

    Args:
        spec: Of what.
        needs: What is to be computed.
        whole: Answer with all of it, or with the coverage report alone.
        seconds: Of processor time, at most.
        memory: Bytes, at most.
    """
    order = {
        "spec": spec.canonical(),
        "needs": dataclasses.asdict(needs),
        "whole": whole,
        "seconds": seconds,
        "memory": memory,
    }
    return _packed(order)


def reading_of(message: type, json: bytes, *, seconds: float, memory: int) -> bytes:
    """An order to read a JSON body, as it is sent.

    Args:
        message: The class it is of, of the protocol.
        json: The body.
        seconds: Of processor time, at most.
        memory: Bytes, at most.
    """
    name = f"{message.__module__}:{message.__qualname__}"
    return _packed({"message": name, "json": json, "seconds": seconds, "memory": memory})


def _packed(order: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(order)
    return LENGTH.pack(len(packed)) + packed
