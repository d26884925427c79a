"""Messages that may be long, read in a thread piece by piece.

Validating a long message in one go would keep the interpreter, and so the event loop, from everything else for seconds.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar

from nowcast_proto.errors import InvalidRequest, InvalidSpec, TooLarge
from nowcast_proto.messages import explain, read_message
from nowcast_proto.spec import MAX_PARAMETERS, ArchitectureSpec, ParameterSpec
from nowcast_proto.stream import Header
from nowcast_proto.wiring import MAX_BLOCKS, MAX_RANGES, WiringBlock, WiringRange
from pydantic import BaseModel, TypeAdapter, ValidationError

M = TypeVar("M", bound=BaseModel)

_AT_ONCE = 256
_VALUES = 20_000
_Lists = dict[str, tuple[TypeAdapter[Any], int]]
_LISTS: _Lists = {"parameters": (TypeAdapter(tuple[ParameterSpec, ...]), MAX_PARAMETERS)}
_GRAPH_LISTS: _Lists = {
    "ranges": (TypeAdapter(tuple[WiringRange, ...]), MAX_RANGES),
    "blocks": (TypeAdapter(tuple[WiringBlock, ...]), MAX_BLOCKS),
}


def of_json(model: type[M], body: bytes) -> M:
    """A long message from a JSON body.

    Raises:
        InvalidSpec, InvalidRequest, TooLarge: It is not such a message, or has more values than any.
    """
    what = model.__name__
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"{what}: the body is no JSON: {str(exc)[:200]}") from exc
    _validate_lists(tree, what)
    try:
        made = model.model_validate(tree)
    except ValidationError as exc:
        raise explain(exc, what=what) from exc
    return _worked_out(made)


def of_stream(model: type[M], header: Header) -> M:
    """The message that heads a stream, long or not.

    Raises:
        MalformedFrame: The stream is of another kind.
        InvalidSpec, InvalidRequest, TooLarge: As `of_json`.
    """
    tree = dict(header.message)
    if isinstance(tree.get("spec"), dict):
        tree["spec"] = dict(tree["spec"])
    _validate_lists(tree, header.kind[:64])
    return _worked_out(read_message(model, dataclasses.replace(header, message=tree)))


def _worked_out(made: M) -> M:
    """What would be worked out on the event loop otherwise, and is kept by the spec."""
    spec = getattr(made, "spec", None)
    if isinstance(spec, ArchitectureSpec):
        spec.digest()
        _ = spec.numel
    return made


def _validate_lists(tree: Any, what: str) -> None:
    """Validate the lists of a spec piece by piece, in place, and refuse what is long elsewhere."""
    spec = tree.get("spec") if isinstance(tree, dict) else None
    if isinstance(spec, dict):
        graph = spec.get("graph")
        for holder, path, kinds in ((spec, "spec", _LISTS), (graph, "spec.graph", _GRAPH_LISTS)):
            for field, (kind, most) in kinds.items():
                if isinstance(holder, dict) and isinstance(holder.get(field), list):
                    holder[field] = _validated(kind, holder[field], most, f"{what}: {path}.{field}")
    _count(tree, what)


def _validated(kind: TypeAdapter[Any], values: list[Any], most: int, where: str) -> tuple[Any, ...]:
    """A long list, some values at a time; the first that is wrong ends it."""
    if len(values) > most:
        raise InvalidSpec(f"{where} has {len(values)} entries", expected=f"at most {most}")
    found: list[Any] = []
    for at in range(0, len(values), _AT_ONCE):
        try:
            found += kind.validate_python(values[at : at + _AT_ONCE])
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            number, *rest = first["loc"]
            place = ".".join(str(part) for part in (at + int(number), *rest))[:160]
            raise InvalidSpec(f"{where}.{place}: {first['msg'][:300]}", remedy="correct the field named") from exc
    return tuple(found)


def _count(tree: Any, what: str) -> None:
    """Refuse a message whose rest, that is validated in one go, has more values than any real one."""
    todo, seen = [tree], 0
    while todo:
        one = todo.pop()
        inside = list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else ()
        seen += len(inside)
        if seen > _VALUES:
            raise TooLarge(f"{what} has too many values", expected=f"at most {_VALUES} outside of a spec's long lists")
        todo += inside
