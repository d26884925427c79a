"""Connections that break at every byte that could matter, and bytes that change on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from nowcast_client.wire.http import HttpTransport
from nowcast_client.wire.session import Session, mint
from nowcast_client.wire.transport import Retry
from nowcast_proto.arrays import frame_of
from nowcast_proto.errors import NowcastError
from nowcast_proto.messages import NowcastJob
from nowcast_proto.spec import ArchitectureSpec, ParameterSpec
from nowcast_proto.tensors import TensorFrame

from .harness import Job, Plan, Proxy, Server

pytestmark = pytest.mark.socket

SPEC = ArchitectureSpec(
    family="sequential",
    parameters=(
        ParameterSpec(name="0.weight", shape=(12, 20)),
        ParameterSpec(name="0.bias", shape=(12,)),
        ParameterSpec(name="2.weight", shape=(3, 12)),
        ParameterSpec(name="2.bias", shape=(3,)),
    ),
)
LANES = 4
"""Connections at work at once; each case mostly waits for the others' bytes."""
ONCE = Retry(attempts=1)
AGAIN = Retry(attempts=12, base=0.005, cap=0.5)


def snapshot(step: int) -> list[TensorFrame]:
    """Tensors on a straight line, so that the linear predictor's answer is known."""
    rng = np.random.default_rng(0)
    return [
        frame_of(p.name, (rng.normal(size=p.shape) + 0.01 * step * rng.normal(size=p.shape)).astype(np.float32))
        for p in SPEC.parameters
    ]


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    running = Proxy(server.port)
    yield running
    running.close()


def soon() -> float:
    return time.monotonic() + 60.0


def session_at(url: str, session_id: str, retry: Retry) -> Session:
    return Session(HttpTransport(url), SPEC, session_id=session_id, timeout=20.0, retry=retry)


@pytest.mark.timeout(900)
def test_upload_cut_anywhere(server: Server) -> None:
    """No partial snapshot ever counts, and trying again completes it."""
    direct = session_at(server.url, mint(), AGAIN)
    seen: list[bytes] = []
    probe = Proxy(server.port, lambda direction, data: seen.append(data) if direction == "up" else None)
    direct.open(soon())
    first = session_at(probe.url, direct.id, ONCE)
    first._open = True
    first.upload(1, lambda: snapshot(1), soon())
    places = cut_places(b"".join(seen))
    assert len(places) > 600

    def cut(lane: int) -> int:
        proxy = Proxy(server.port)
        watcher = session_at(server.url, mint(), AGAIN)
        watcher.open(soon())
        for number, place in enumerate(places[lane::LANES]):
            # A step of one digit, as in the probe: the stream has the same bytes at the same places.
            step = 1 + number % 9
            if step == 1:
                watcher.renew()
                watcher.open(soon())
            session = session_at(proxy.url, watcher.id, ONCE)
            session._open = True
            proxy.plans.append(Plan("up", place, reset=bool(number % 2)))
            with pytest.raises(NowcastError):
                session.upload(step, partial(snapshot, step), soon())
            state = watcher.state(soon())
            assert state is not None
            assert not [s for s in state.snapshots if s.step == step and s.state == "complete"], place
            session._exchange.retry = AGAIN
            session.upload(step, partial(snapshot, step), soon())  # returns once the service says "complete"
            session._exchange.transport.close()
        proxy.close()
        return proxy.struck

    with ThreadPoolExecutor(LANES) as pool:
        assert sum(pool.map(cut, range(LANES))) == len(places)


def cut_places(stream: bytes) -> list[int]:
    """Every byte of the HTTP and the stream header, and 200 places of the rest."""
    packed = stream.index(b"\x84\xa7version")  # a map of four whose first key is "version"
    header_end = packed + int.from_bytes(stream[packed - 4 : packed], "little")
    payload = np.linspace(header_end, len(stream) - 2, 200).astype(int)
    return sorted({*range(1, header_end), *payload.tolist()})


def nowcast(server: Server) -> tuple[Session, NowcastJob, list[bytes]]:
    """A finished nowcast, and its tensors' bytes."""
    session = session_at(server.url, mint(), AGAIN)
    steps = (10, 20, 30, 40, 50)
    for step in steps:
        session.upload(step, partial(snapshot, step), soon())
    job = NowcastJob(nowcast=mint(), steps=steps, k=3, predictor="linear", reply="delta", deadline=600)
    _, frames = session.nowcast(job, dict.fromkeys(steps), soon())
    return session, job, [bytes(f.view()) for f in frames]


def read(frames: Sequence[TensorFrame]) -> list[bytes]:
    return [bytes(f.view()) for f in frames]


@pytest.mark.timeout(900)
def test_reply_cut_anywhere(server: Server) -> None:
    """No partial answer is ever handed out, and asking again gives the whole one."""
    origin, job, expected = nowcast(server)
    places = cut_places(reply_bytes(server, origin, job))
    assert len(places) > 600

    def cut(lane: int) -> int:
        proxy = Proxy(server.port)
        for number, place in enumerate(places[lane::LANES]):
            session = session_at(proxy.url, origin.id, ONCE)
            proxy.plans.append(Plan("down", place, reset=bool(number % 2)))
            with pytest.raises(NowcastError):
                session._fetch(job, soon())
            session._exchange.retry = AGAIN
            _, frames = session._fetch(job, soon())
            session._exchange.transport.close()
            assert read(frames) == expected, place
        proxy.close()
        return proxy.struck

    with ThreadPoolExecutor(LANES) as pool:
        assert sum(pool.map(cut, range(LANES))) == len(places)


def reply_bytes(server: Server, origin: Session, job: NowcastJob) -> bytes:
    """A whole reply as it crosses the line."""
    seen: list[bytes] = []
    probe = Proxy(server.port, lambda direction, data: seen.append(data) if direction == "down" else None)
    session_at(probe.url, origin.id, ONCE)._fetch(job, soon())
    return b"".join(seen)


def test_question_cut_anywhere(server: Server, proxy: Proxy) -> None:
    """Asking for a nowcast, cut at every third byte of the request and beyond: one nowcast comes of it."""
    origin, job, expected = nowcast(server)
    for number, place in enumerate(range(1, 600, 3)):
        session = session_at(proxy.url, origin.id, AGAIN)
        session._open = True
        proxy.plans.append(Plan("up", place, reset=bool(number % 2)))
        again = job.model_copy(update={"nowcast": mint()})
        _, frames = session.nowcast(again, dict.fromkeys(job.steps), soon())
        session._exchange.transport.close()
        assert read(frames) == expected, place
    assert proxy.struck == 200


@pytest.mark.timeout(900)
def test_corrupted_reply(server: Server) -> None:
    """A flipped bit in each byte of the headers and 200 of the payload: refused, or in a field nobody acts on."""
    origin, job, expected = nowcast(server)
    stream = reply_bytes(server, origin, job)
    packed = stream.index(b"\x84\xa7version")
    header_end = packed + int.from_bytes(stream[packed - 4 : packed], "little")
    places = cut_places(stream)

    def corrupt(lane: int) -> int:
        proxy = Proxy(server.port)
        refused = 0
        for number, place in enumerate(places[lane::LANES]):
            session = session_at(proxy.url, origin.id, ONCE)
            # A flip in the HTTP header may leave it waiting for bytes that never come; one in the payload may not.
            session._exchange.timeout = 0.5 if place < header_end else 20.0
            proxy.plans.append(Plan("down", place, flip=(number + lane) % 8))
            try:
                _, frames = session._fetch(job, time.monotonic() + session._exchange.timeout)
            except NowcastError:
                refused += place >= header_end
            else:
                assert read(frames) == expected, place
                assert place < header_end, "a flipped payload bit went unnoticed"
            session._exchange.transport.close()
        proxy.close()
        return refused

    with ThreadPoolExecutor(LANES) as pool:
        assert sum(pool.map(corrupt, range(LANES))) == sum(place >= header_end for place in places) == 200


def test_corrupted_upload(server: Server, proxy: Proxy) -> None:
    """A flipped bit in an upload's payload: refused by its checksum, sent again, complete."""
    origin, _, _ = nowcast(server)
    rng = np.random.default_rng(1)
    for number, place in enumerate(rng.integers(1100, 2000, 60).tolist()):
        step = 100 + number
        session = session_at(proxy.url, origin.id, AGAIN)
        session._open = True
        proxy.plans.append(Plan("up", place, flip=number % 8))
        session.upload(step, partial(snapshot, step), soon())
        session._exchange.transport.close()
    fresh = session_at(server.url, origin.id, AGAIN)
    steps = tuple(range(155, 160))
    job = NowcastJob(nowcast=mint(), steps=steps, k=3, predictor="linear", reply="delta", deadline=600)
    fresh._open = True
    _, through = fresh.nowcast(job, dict.fromkeys(steps), soon())
    clean = session_at(server.url, mint(), AGAIN)
    for step in steps:
        clean.upload(step, partial(snapshot, step), soon())
    _, direct = clean.nowcast(job, dict.fromkeys(steps), soon())
    assert read(through) == read(direct)


@pytest.mark.parametrize("seed", range(4))
def test_training_over_a_line_that_keeps_breaking(server: Server, clean: torch.Tensor, seed: int) -> None:
    """A whole training over connections that each break somewhere: the weights are those of a quiet line."""
    rng = np.random.default_rng(seed)
    proxy = Proxy(server.port)
    proxy.plans = [
        Plan("up" if rng.random() < 0.5 else "down", int(rng.integers(0, 900)), reset=bool(rng.random() < 0.5))
        for _ in range(40)
    ]
    job = Job(proxy.url, retry=Retry(attempts=60, base=0.005, cap=0.05), wait=30.0)
    job.run(70)
    assert torch.equal(job.weights(), clean), job.handle.summary()
    assert proxy.struck > 5
    job.handle.close()
    proxy.close()
