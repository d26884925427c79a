"""What a client needs of a connection: requests and replies, which errors are worth another try, and how often.

A transport sends one request and hands back a reply whose body is read in pieces: `nowcast_client.wire.http` over the
network, `nowcast_client.testing` for tests.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from nowcast_proto.errors import (
    Busy,
    ChecksumMismatch,
    DeadlineExceeded,
    ErrorBody,
    InternalError,
    MalformedFrame,
    NowcastError,
    TooLarge,
    Unavailable,
)
from pydantic import ValidationError

from nowcast_client.errors import BadReply, ConnectFailed, TimedOut, TransportError

T = TypeVar("T")
Chunk = bytes | memoryview
WRITE_BYTES = 1 << 18
"""Bytes of one write; larger ones are copied more often on their way through the HTTP library."""
MAX_JSON = 1 << 24
"""Most bytes of a reply that is not a tensor stream."""


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        method: HTTP method.
        path: Path and query.
        headers: Besides what the transport adds (host, length, key).
        body: Makes the body anew for every attempt; None for none.
        content_length: Its length.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Callable[[], Iterator[Chunk]] | None = None
    content_length: int = 0


@dataclass
class Reply:
    """One reply whose body has not been read yet.

    Attributes:
        status: HTTP status.
        headers: Lower-case names.
        chunks: The body in pieces; may raise `TransportError` at any of them.
    """

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]

    def text(self) -> bytes:
        """The whole body of a reply that is no tensor stream.

        Raises:
            BadReply: It is longer than such a reply can be.
        """
        parts, size = [], 0
        for chunk in self.chunks:
            parts.append(chunk)
            size += len(chunk)
            if size > MAX_JSON:
                raise BadReply(f"a reply of more than {MAX_JSON} bytes", expected="a JSON document")
        return b"".join(parts)


class Transport(Protocol):
    """What a client needs of a connection."""

    def send(self, request: Request, *, timeout: float) -> contextlib.AbstractContextManager[Reply]:
        """Send a request; the reply is valid inside the context.

        Args:
            request: What to send.
            timeout: Seconds without progress after which to give up, for connecting, each read and each write.

        Raises:
            TransportError: Nothing, or only part of it, came through.
        """
        ...

    def close(self) -> None:
        """Drop all connections."""
        ...


_chance = random.Random()
"""Its own, as the process's belongs to the training."""


@dataclass(frozen=True)
class Retry:
    """When and how often to try again.

    Attributes:
        attempts: Tries in all.
        base: Seconds before the second try; doubles with every further one.
        cap: Most seconds between tries, whatever the service asks for.
        jitter: Part of the delay that is drawn at random, so that many clients do not come back at once.
    """

    attempts: int = 5
    base: float = 0.1
    cap: float = 10.0
    jitter: float = 0.5

    def delay(self, attempt: int, error: NowcastError) -> float:
        """Seconds before try ``attempt + 1`` (attempts count from 1)."""
        wanted = self.base * 2.0 ** (attempt - 1)
        if error.retry_after is not None:
            wanted = max(wanted, error.retry_after)
        return min(self.cap, wanted) * (1.0 + self.jitter * _chance.random())


RETRYABLE = (TransportError, Busy, Unavailable, ChecksumMismatch, MalformedFrame, BadReply, InternalError)
"""Errors after which the same request may succeed: every call of the protocol is idempotent."""
NOT_AGAIN: tuple[type[NowcastError], ...] = (TimedOut,)
"""Errors after which a whole history is not sent again: it would only take too long once more."""


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> NowcastError:
    """The typed error in a reply that is not a success; one without a body of ours comes from something in between."""
    try:
        retry_after: float | None = float(headers.get("retry-after", ""))
    except ValueError:
        retry_after = None
    try:
        parsed = ErrorBody.model_validate_json(body)
    except ValidationError:
        return _from_between(status, headers, retry_after)
    return NowcastError.from_body(parsed, retry_after=retry_after)


def _from_between(status: int, headers: Mapping[str, str], retry_after: float | None) -> NowcastError:
    """What a gateway's or proxy's own answer means for the service behind it."""
    name = headers.get("server") or headers.get("via") or ""
    named = f" ({name[:60]})" if name else ""
    who = f"a gateway{named}"
    if status in (408, 504, 524):
        return TimedOut(
            f"{who} gave up waiting for the service: status {status}",
            remedy="check that the service runs, or let the gateway wait longer",
            retry_after=retry_after,
        )
    if status in (502, 503) or 520 <= status <= 530:
        return ConnectFailed(
            f"{who} cannot reach the service behind it: status {status}",
            remedy="check that the service runs",
            retry_after=retry_after,
        )
    if status == 429:
        return Busy(f"{who} lets no more requests through for now: status 429", retry_after=retry_after)
    if status == 413:
        return TooLarge(
            f"a proxy or gateway{named} in front of the service refuses a body of this size: status 413",
            expected="a proxy that lets whole snapshots through",
            remedy="raise its limit on request bodies (client_max_body_size of nginx): see docs/operations.md",
        )
    return BadReply(
        f"status {status} with a body that is no error of the protocol{named}",
        expected="an error body in JSON",
        remedy="check that the url is a Nowcast service's",
    )


def checked(reply: Reply) -> Reply:
    """The reply, if it is a success.

    Raises:
        NowcastError: The typed error it carries.
    """
    if 200 <= reply.status < 300:
        return reply
    raise error_of(reply.status, reply.headers, reply.text())


def call(
    transport: Transport,
    request: Request,
    read: Callable[[Reply], T],
    *,
    timeout: float,
    deadline: float,
    retry: Retry,
    stop: threading.Event | None = None,
    final: tuple[type[NowcastError], ...] = (),
    note: Callable[[Mapping[str, str]], object] | None = None,
) -> T:
    """Send a request until its reply has been read whole, or trying again makes no sense.

    Args:
        transport: Where to.
        request: Must be idempotent.
        read: Reads a successful reply; may raise a retryable error as well.
        timeout: Seconds without progress after which a try is given up.
        deadline: Value of ``time.monotonic()`` after which no try begins and no further piece of a body is moved.
        retry: How often.
        stop: Ends the waiting and the moving of bodies early.
        final: Errors after which this request is not tried again.
        note: Shown the headers of every reply.

    Raises:
        NowcastError: What the last try met; `DeadlineExceeded` when there was no time for any.
    """
    stop = stop or threading.Event()
    guarded = Request(
        request.method,
        request.path,
        request.headers,
        None if request.body is None else lambda: _until(request.body(), deadline, stop),  # type: ignore[misc]
        request.content_length,
    )
    attempt = 0
    while True:
        attempt += 1
        left = deadline - time.monotonic()
        if left <= 0 or stop.is_set():
            raise DeadlineExceeded(f"no time is left for {request.method} {request.path}")
        try:
            with transport.send(guarded, timeout=min(timeout, left)) as reply:
                if note is not None:
                    note(reply.headers)
                reply.chunks = _until(reply.chunks, deadline, stop)
                return read(checked(reply))
        except RETRYABLE as exc:
            pause = retry.delay(attempt, exc)
            if (
                isinstance(exc, final)
                or attempt >= retry.attempts
                or time.monotonic() + pause >= deadline
                or stop.wait(pause)
            ):
                raise


C = TypeVar("C", bound=Chunk)


def _until(chunks: Iterator[C], deadline: float, stop: threading.Event) -> Iterator[C]:
    for chunk in chunks:
        if stop.is_set() or time.monotonic() > deadline:
            raise DeadlineExceeded("the exchange took longer than it may")
        yield chunk


def json_body(document: object) -> tuple[Callable[[], Iterator[Chunk]], int]:
    """Body and length of a JSON request."""
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return (lambda: iter((data,))), len(data)
