"""Retries, deadlines and the mapping of errors; the API's calls against a fake."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

import numpy as np
import pytest
from nowcast_client.errors import BadReply, ConnectFailed, TimedOut, TransportError
from nowcast_client.testing import FakeTransport, FaultyTransport
from nowcast_client.wire.api import NowcastClient
from nowcast_client.wire.http import HttpTransport
from nowcast_client.wire.session import Session
from nowcast_client.wire.transport import Reply, Request, Retry, call
from nowcast_proto.arrays import frame_of
from nowcast_proto.errors import (
    Busy,
    DeadlineExceeded,
    InvalidRequest,
    InvalidSnapshot,
    MalformedFrame,
    NotFound,
    TooLarge,
    Unavailable,
)
from nowcast_proto.messages import NowcastJob, NowcastReplyHeader, NowcastRequest
from nowcast_proto.spec import ArchitectureSpec, ParameterSpec
from nowcast_proto.stream import Decoder, Encoder
from nowcast_proto.version import MEDIA_TYPE

from .service import FakeService, linear

FAST = Retry(attempts=3, base=0.001, cap=0.01)
SPEC = ArchitectureSpec(family="sequential", parameters=(ParameterSpec(name="w", shape=(2, 3)),))


def ok(request: Request) -> tuple[int, Mapping[str, str], bytes]:
    return 200, {}, b"fine"


def ask(transport: object, *, retry: Retry = FAST, seconds: float = 60.0, stop: threading.Event | None = None) -> bytes:
    return call(
        transport,  # type: ignore[arg-type]
        Request("GET", "/x"),
        Reply.text,
        timeout=20.0,
        deadline=time.monotonic() + seconds,
        retry=retry,
        stop=stop,
    )


def test_a_fault_is_tried_again_and_a_lasting_one_raised() -> None:
    faulty = FaultyTransport(FakeTransport(ok), {0: "before", 1: "after"})
    assert ask(faulty) == b"fine"
    assert faulty.count == 3
    with pytest.raises(ConnectFailed):
        ask(FaultyTransport(FakeTransport(ok), dict.fromkeys(range(9), "before")))


def test_the_services_wish_is_waited_for() -> None:
    replies = [(429, {"Retry-After": "0.05"}, Busy("full").body().model_dump_json().encode()), ok(Request("GET", "/"))]
    transport = FakeTransport(lambda request: replies.pop(0))
    start = time.monotonic()
    assert ask(transport, retry=Retry(attempts=3, base=0.001, cap=1.0)) == b"fine"
    assert time.monotonic() - start >= 0.05


def test_what_trying_again_cannot_change_is_raised_at_once() -> None:
    transport = FakeTransport(lambda r: (404, {}, NotFound("no such session").body().model_dump_json().encode()))
    with pytest.raises(NotFound, match="no such session"):
        ask(transport)
    assert len(transport.requests) == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (502, ConnectFailed),
        (503, ConnectFailed),
        (522, ConnectFailed),
        (504, TimedOut),
        (429, Busy),
        (413, TooLarge),
        (418, BadReply),
    ],
)
def test_strangers_in_between_are_named(status: int, error: type[Exception]) -> None:
    """What a gateway says means what it would mean without one."""
    with pytest.raises(error, match=f"(?s)(?=.*nginx)(?=.*{status})"):
        ask(FakeTransport(lambda r: (status, {"Server": "nginx"}, b"<html>")))


def test_a_refusal_of_the_service_itself_is_no_gateway_s() -> None:
    away = Unavailable("shutting down").body().model_dump_json().encode()
    with pytest.raises(Unavailable, match="shutting down"):
        ask(FakeTransport(lambda r: (503, {"Server": "nginx"}, away)))


@pytest.mark.parametrize(("status", "sent"), [(504, 1), (502, 3)])
def test_a_history_is_not_sent_again_to_who_gave_up_waiting(status: int, sent: int) -> None:
    transport = FakeTransport(lambda r: (status, {}, b"<html>"))
    with pytest.raises(TransportError):
        NowcastClient(transport=transport, retry=FAST).nowcast(SPEC, [{"w": np.zeros((2, 3))}] * 5, 3)
    assert len(transport.requests) == sent


def session_of(instances: str) -> FakeTransport:
    """A service whose answers come from these instances, one after another."""
    turn = iter(instances)
    state = {"session": "s", "spec_digest": SPEC.digest(), "keep": 6, "snapshots": [], "expires_in": 9.0}
    return FakeTransport(lambda r: (200, {"Nowcast-Instance": next(turn)}, json.dumps(state).encode()))


@pytest.mark.parametrize(("instances", "told"), [("aaaa", 0), ("aabb", 0), ("abcd", 0), ("abab", 1), ("aabbcca", 1)])
def test_several_instances_behind_one_address_are_named_once(
    instances: str, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A restart brings a new instance and the old one never comes back; a balancer's do."""
    session = Session(session_of(instances), SPEC)
    for _ in instances:
        session.open(time.monotonic() + 60.0)
    assert sum("more than one instance" in line for line in caplog.messages) == told


def test_a_service_that_dies_while_lost_snapshots_are_sent_again_is_waited_for() -> None:
    service = FakeService(linear)
    frames = {s: (lambda s=s: [frame_of("w", np.full((2, 3), float(s), np.float32))]) for s in range(5)}
    job = NowcastJob(nowcast="n", steps=tuple(frames), k=2, predictor="linear", reply="delta")
    # Session, question, the answer that all are missing; then nobody is there for the tries of two uploads.
    faulty = FaultyTransport(service.transport, dict.fromkeys(range(2, 9), "before"))
    session = Session(faulty, SPEC, retry=FAST)
    header, _ = session.nowcast(job, frames, time.monotonic() + 60.0)
    assert header.steps == job.steps
    assert session.resent == 5


def test_deadline_and_stop_end_the_trying() -> None:
    dead = FaultyTransport(FakeTransport(ok), dict.fromkeys(range(9999), "before"))
    # On a busy machine the deadline may pass before the first try, or in the middle of one.
    with pytest.raises((ConnectFailed, DeadlineExceeded)):
        ask(dead, retry=Retry(attempts=9999, base=0.01, cap=0.02), seconds=0.2)
    assert dead.count < 9999
    stop = threading.Event()
    stop.set()
    with pytest.raises(DeadlineExceeded):
        ask(dead, stop=stop)


def test_delays_grow_are_capped_and_spread() -> None:
    retry = Retry(base=1.0, cap=4.0, jitter=0.5)
    error = Busy("full")
    for attempt, base in [(1, 1.0), (2, 2.0), (3, 4.0), (9, 4.0)]:
        delays = [retry.delay(attempt, error) for _ in range(50)]
        assert base <= min(delays) < max(delays) <= 1.5 * base
    assert retry.delay(1, Busy("full", retry_after=3.0)) >= 3.0


def test_nobody_at_the_address() -> None:
    with pytest.raises(ConnectFailed):
        ask(HttpTransport("http://127.0.0.1:9"))
    with pytest.raises(ConnectFailed):
        ask(HttpTransport("unix:///no/such/socket"))


def doubled(request: Request) -> tuple[int, Mapping[str, str], bytes]:
    decoder = Decoder()
    for chunk in request.body() if request.body else ():
        decoder.feed(chunk)
    asked = NowcastRequest.model_validate(decoder.finish().message)
    newest = np.frombuffer(decoder.frames[-1].view(), np.float32).reshape(2, 3)
    header = NowcastReplyHeader(
        nowcast="n", k=asked.k, predictor="linear", reply=asked.reply, update_scale=1, spec_digest=asked.spec.digest()
    )
    stream = b"".join(Encoder(NowcastReplyHeader.KIND, header, [frame_of("w", 2 * newest)]).chunks())
    return 200, {"Content-Type": MEDIA_TYPE}, stream


def test_one_shot_nowcast() -> None:
    history = [{"w": np.full((2, 3), float(i))} for i in range(5)]
    future = NowcastClient(transport=FakeTransport(doubled)).nowcast(SPEC, history, 3)
    assert future["w"].tolist() == np.full((2, 3), 8.0).tolist()


def test_torch_in_torch_out() -> None:
    torch = pytest.importorskip("torch")
    history = [{"w": torch.full((2, 3), float(i), dtype=torch.bfloat16)} for i in range(5)]
    future = NowcastClient(transport=FakeTransport(doubled)).nowcast(SPEC, history, 3)
    assert torch.equal(future["w"], torch.full((2, 3), 8.0))


def test_snapshots_that_do_not_fit_the_spec_are_refused_before_sending() -> None:
    transport = FakeTransport(doubled)
    client = NowcastClient(transport=transport)
    with pytest.raises(InvalidSnapshot, match="lacks 'w'"):
        client.nowcast(SPEC, [{}], 1)
    with pytest.raises(InvalidSnapshot, match=r"shape \[3, 2\]"):
        client.nowcast(SPEC, [{"w": np.zeros((3, 2))}], 1)
    with pytest.raises(InvalidRequest, match="this nowcast: k: "):
        client.nowcast(SPEC, [{"w": np.zeros((2, 3))}], 0)
    with pytest.raises(InvalidRequest, match="scale: "):
        client.nowcast(SPEC, [{"w": np.zeros((2, 3))}], 1, scale=2.0)  # type: ignore[call-arg]
    assert not transport.requests


def test_an_answer_to_another_question_is_refused() -> None:
    def other(request: Request) -> tuple[int, Mapping[str, str], bytes]:
        changed = Request(request.method, request.path, request.headers, request.body)
        status, headers, body = doubled(changed)
        return status, headers, body.replace(b"\xa1k\x03", b"\xa1k\x04")

    client = NowcastClient(transport=FakeTransport(other), retry=FAST)
    with pytest.raises(MalformedFrame, match="another request"):
        client.nowcast(SPEC, [{"w": np.zeros((2, 3))}] * 5, 3)


def test_the_plain_api_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import nowcast_client\n"
        "from nowcast_client import NowcastClient, AsyncNowcastClient\n"
        "NowcastClient('http://127.0.0.1:9')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
