"""Long bodies read by another process: the same message comes back, the same errors, and it can be ended."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
from collections.abc import Iterator

import pytest
from nowcast_proto.errors import InvalidRequest, InvalidSpec, NowcastError, TooLarge, Unavailable
from nowcast_proto.messages import SessionCreate, Verdict
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.runtime import reading
from nowcast_service.runtime.long_messages import in_pieces, no_collection, put_together
from nowcast_service.runtime.reading import Reader
from nowcast_service.runtime.spec_nursery import Nursery

from ..graph.specs import gpt2
from ..graph.test_explicit import written_out


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    made.control()
    yield made
    made.stop()


@pytest.fixture
def reader(nursery: Nursery) -> Iterator[Reader]:
    made = Reader(nursery, seconds=60.0, memory=1 << 30)
    yield made
    made.stop()


LONG = ArchitectureSpec.model_validate(
    {
        "family": "own",
        "parameters": [{"name": f"layers.{n}.weight", "shape": [1, n + 1]} for n in range(700)],
        "ties": {"head": "layers.0.weight"},
        "num_heads": 4,
    }
)


@pytest.mark.parametrize("spec", [LONG, written_out(gpt2())], ids=["of a family", "with a graph of its own"])
def test_a_message_comes_back_as_it_was_sent(reader: Reader, spec: ArchitectureSpec) -> None:
    sent = SessionCreate(spec=spec, keep=3, dtype="bfloat16")
    found = asyncio.run(reader.read(SessionCreate, sent.model_dump_json(exclude_none=True).encode()))
    assert found == sent
    assert found.spec.digest() == spec.digest()
    assert found.spec.canonical() == spec.canonical()


def test_so_does_one_without_a_spec(reader: Reader) -> None:
    sent = Verdict(nowcast="n1", outcome="kept")
    assert asyncio.run(reader.read(Verdict, sent.model_dump_json(exclude_none=True).encode())) == sent


@pytest.mark.parametrize(
    ("body", "kind", "named"),
    [
        (b"[" * 200_000, InvalidRequest, "no JSON"),
        (b'{"spec": 3}', NowcastError, "spec"),
        (b'{"spec": {"family": "own", "parameters": [{"name": "a"}]}}', InvalidSpec, r"spec\.parameters\.0\.shape"),
        (b'{"spec": [' + b"9," * 30_000 + b"9]}", TooLarge, "too many values"),
    ],
)
def test_errors_are_those_of_the_message(reader: Reader, body: bytes, kind: type[NowcastError], named: str) -> None:
    with pytest.raises(kind, match=named):
        asyncio.run(reader.read(SessionCreate, body))


def test_time_and_memory_are_bounded(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BYTES_PER_SECOND", 1e12)
    parameters = [{"name": f"layers.{n}.weight", "shape": [1]} for n in range(30_000)]
    body = json.dumps({"spec": {"family": "own", "parameters": parameters}}).encode()
    for tight in (Reader(nursery, seconds=0.01, memory=1 << 30), Reader(nursery, seconds=60.0, memory=1 << 12)):
        with pytest.raises(TooLarge, match="to read"):
            asyncio.run(tight.read(SessionCreate, body))
        tight.stop()


def test_the_process_is_started_again(nursery: Nursery, reader: Reader) -> None:
    assert nursery.pid is not None
    os.kill(nursery.pid, signal.SIGKILL)
    sent = Verdict(nowcast="n1", outcome="kept")
    assert asyncio.run(reader.read(Verdict, sent.model_dump_json(exclude_none=True).encode())) == sent


def test_a_stopped_service_reads_no_more() -> None:
    nursery = Nursery()
    nursery.control()
    reader = Reader(nursery, seconds=60.0, memory=1 << 30)
    nursery.stop()
    with pytest.raises(Unavailable):
        asyncio.run(reader.read(Verdict, b"{}"))
    reader.stop()


def test_pieces_are_short() -> None:
    """None holds up the interpreter that puts them together."""
    _, pieces = in_pieces(SessionCreate, json.dumps({"spec": json.loads(LONG.canonical())}).encode())
    assert len(pieces) == 3


def test_nothing_is_collected_while_any_is_read() -> None:
    assert gc.isenabled()
    with no_collection():
        with no_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_entries_share_the_names_of_their_fields() -> None:
    """They would be half of what a long spec takes."""
    rest, pieces = in_pieces(SessionCreate, json.dumps({"spec": json.loads(LONG.canonical())}).encode())
    found = put_together(SessionCreate, rest, map(memoryview, pieces))
    assert len({id(one.model_fields_set) for one in found.spec.parameters}) == 1
    assert found.spec == LONG
