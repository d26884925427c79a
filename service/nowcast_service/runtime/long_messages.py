"""Messages that may be long.

Reading a long message in one go would keep the interpreter, and so the event loop, from everything else for seconds. A
JSON body is therefore read by a child of the process that works on specs, which hands it back in pieces; the head of a
stream, which the decoder has unpacked already, is validated piece by piece in a thread.
"""

from __future__ import annotations

import contextlib
import gc
import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import msgpack  # type: ignore[import-untyped]
from nowcast_proto.errors import InvalidRequest, InvalidSpec, TooLarge
from nowcast_proto.messages import explain, read_message
from nowcast_proto.spec import MAX_PARAMETERS, ArchitectureSpec, ParameterSpec
from nowcast_proto.stream import Header
from nowcast_proto.wiring import MAX_BLOCKS, MAX_RANGES, WiringBlock, WiringRange
from pydantic import BaseModel, TypeAdapter, ValidationError

M = TypeVar("M", bound=BaseModel)

AT_ONCE = 256
_VALUES = 20_000
_Lists = dict[str, tuple[TypeAdapter[Any], int]]
_LISTS: _Lists = {"parameters": (TypeAdapter(tuple[ParameterSpec, ...]), MAX_PARAMETERS)}
_GRAPH_LISTS: _Lists = {
    "ranges": (TypeAdapter(tuple[WiringRange, ...]), MAX_RANGES),
    "blocks": (TypeAdapter(tuple[WiringBlock, ...]), MAX_BLOCKS),
}


def in_pieces(model: type[BaseModel], body: bytes) -> tuple[bytes, list[bytes]]:
    """A JSON body checked and taken apart, by a process that may take its time.

    Returns:
        What is left of the message with its digest, and the entries of its long lists, `AT_ONCE` at a time, as msgpack.

    Raises:
        InvalidSpec, InvalidRequest, TooLarge: It is not such a message, or has more values than any.
    """
    what = model.__name__
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"{what}: the body is no JSON: {str(exc)[:200]}") from exc
    _validate_lists(tree, what)
    made = _validated_rest(model, tree)
    spec = getattr(made, "spec", None)
    pieces = []
    for holder, field, _ in _long_lists(tree):
        values = holder.pop(field)
        for at in range(0, len(values), AT_ONCE):
            entries = [one.model_dump(mode="json", exclude_defaults=True) for one in values[at : at + AT_ONCE]]
            pieces.append(msgpack.packb([field, entries]))
    digest = spec.digest() if isinstance(spec, ArchitectureSpec) else None
    return msgpack.packb({"rest": tree, "digest": digest}), pieces


def put_together(model: type[M], rest: bytes, pieces: Iterable[memoryview]) -> M:
    """The message that `in_pieces` took apart; never busy with one thing for long."""
    known = msgpack.unpackb(rest)
    tree: dict[str, Any] = known["rest"]
    kinds = {**_LISTS, **_GRAPH_LISTS}
    lists: dict[str, list[Any]] = {}
    for piece in pieces:
        field, entries = msgpack.unpackb(piece)
        lists.setdefault(field, []).extend(_lean(kinds[field][0].validate_python(entries)))
    for field, values in lists.items():
        holder = tree["spec"] if field in _LISTS else tree["spec"]["graph"]
        holder[field] = tuple(values)
    made = _validated_rest(model, tree)
    spec = getattr(made, "spec", None)
    if isinstance(spec, ArchitectureSpec):
        spec.__dict__["_digest"] = known["digest"]
    return _worked_out(made)


def _validated_rest(model: type[M], tree: Any) -> M:
    try:
        return model.model_validate(tree)
    except ValidationError as exc:
        raise explain(exc, what=model.__name__) from exc


def of_stream(model: type[M], header: Header) -> M:
    """The message that heads a stream, long or not. The header's own is used up, so that both are never held.

    Raises:
        MalformedFrame: The stream is of another kind.
        InvalidSpec, InvalidRequest, TooLarge: As `of_json`.
    """
    _validate_lists(header.message, header.kind[:64])
    return _worked_out(read_message(model, header))


def _worked_out(made: M) -> M:
    """What would be worked out on the event loop otherwise, and is kept by the spec."""
    spec = getattr(made, "spec", None)
    if isinstance(spec, ArchitectureSpec):
        spec.digest()
        _ = spec.numel
    return made


def _long_lists(tree: Any) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The long lists of a message: what holds each, its field, and where that is."""
    spec = tree.get("spec") if isinstance(tree, dict) else None
    graph = spec.get("graph") if isinstance(spec, dict) else None
    for holder, path, kinds in ((spec, "spec", _LISTS), (graph, "spec.graph", _GRAPH_LISTS)):
        for field in kinds:
            if isinstance(holder, dict) and isinstance(holder.get(field), list | tuple):
                yield holder, field, path


def _validate_lists(tree: Any, what: str) -> None:
    """Validate the lists of a spec piece by piece, in place, and refuse what is long elsewhere."""
    for holder, field, path in _long_lists(tree):
        kind, most = (_LISTS | _GRAPH_LISTS)[field]
        holder[field] = _validated(kind, holder[field], most, f"{what}: {path}.{field}")
    _count(tree, what)


def _validated(kind: TypeAdapter[Any], values: list[Any], most: int, where: str) -> tuple[Any, ...]:
    """A long list, some values at a time, which are let go; the first that is wrong ends it."""
    if len(values) > most:
        raise InvalidSpec(f"{where} has {len(values)} entries", expected=f"at most {most}")
    found: list[Any] = []
    for at in range(0, len(values), AT_ONCE):
        try:
            found += _lean(kind.validate_python(values[at : at + AT_ONCE]))
            values[at : at + AT_ONCE] = [None] * len(values[at : at + AT_ONCE])
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            number, *rest = first["loc"]
            place = ".".join(str(part) for part in (at + int(number), *rest))[:160]
            raise InvalidSpec(f"{where}.{place}: {first['msg'][:300]}", remedy="correct the field named") from exc
    return tuple(found)


_FIELDS: dict[frozenset[str], set[str]] = {}


def _lean(models: tuple[BaseModel, ...]) -> tuple[BaseModel, ...]:
    """The same, with one set for the names of the fields that were given: each its own is half of what they take."""
    for one in models:
        given = one.__pydantic_fields_set__
        object.__setattr__(one, "__pydantic_fields_set__", _FIELDS.setdefault(frozenset(given), given))
    return models


class _Readers:
    """Readers under way; while there are any, nothing is collected."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._before = True

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        with self._lock:
            if not self._count:
                self._before = gc.isenabled()
                gc.disable()
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if not self._count and self._before:
                    gc.enable()


no_collection = _Readers().one_more
"""While a long message is read: all that is made is needed, and going through it would hold up all else."""


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
