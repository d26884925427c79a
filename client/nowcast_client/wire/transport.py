"""How bytes reach the service: TCP or a unix socket, with deadlines and retries; a fake and a faulty one beside it.

A transport sends one request and hands back a reply whose body is read in pieces. httpx stays in here: each of its
exceptions leaves as a `nowcast_client.errors.TransportError`.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import httpx
from nowcast_proto.errors import (
    Busy,
    ChecksumMismatch,
    DeadlineExceeded,
    ErrorBody,
    InternalError,
    MalformedFrame,
    NowcastError,
    Unavailable,
)
from pydantic import ValidationError

from nowcast_client.errors import AttachError, BadReply, ConnectFailed, ConnectionCut, TimedOut, TransportError

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


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """Turn every httpx exception into one of ours."""
    try:
        yield
    except httpx.TimeoutException as exc:
        raise TimedOut(
            f"the service made no progress ({type(exc).__name__})", remedy="check that it runs, or allow it more time"
        ) from exc
    except httpx.ConnectError as exc:
        raise ConnectFailed(f"the service cannot be reached: {exc}", remedy="check the url and that it runs") from exc
    except httpx.HTTPError as exc:
        raise ConnectionCut(f"the exchange broke off: {type(exc).__name__}: {exc}", remedy="try again") from exc
    except (httpx.StreamError, httpx.InvalidURL) as exc:
        raise ConnectionCut(f"the exchange broke off: {type(exc).__name__}", remedy="try again") from exc


def _target(url: str) -> tuple[str, str | None]:
    """Base URL and unix socket path of a service address."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        path = parts.netloc + parts.path
        if not path:
            raise AttachError(f"url {url!r} names no socket", expected="unix:///path/to/socket")
        return "http://nowcast", path
    if parts.scheme in ("http", "https") and parts.netloc:
        return url.rstrip("/"), None
    raise AttachError(f"url {url!r}", expected="http://host:port, https://host:port or unix:///path/to/socket")


def _local(base: str) -> bool:
    return urlsplit(base).hostname in ("127.0.0.1", "localhost", "::1", "nowcast")


def _secure(base: str) -> bool:
    """Whether there are certificates to check; reading the trusted ones takes longer than a small nowcast."""
    return urlsplit(base).scheme == "https"


def _headers(request: Request, api_key: str | None) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", **request.headers}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    if request.body is not None:
        headers["Content-Length"] = str(request.content_length)
    return headers


class HttpTransport:
    """HTTP/1.1 over TCP, TLS or a unix socket.

    Args:
        url: ``http://host:port``, ``https://host:port`` or ``unix:///path``.
        api_key: Sent as a bearer token.

    Raises:
        AttachError: The url is none of these.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        base, socket_path = _target(url)
        self._api_key = api_key
        # A proxy from the environment never stands between a process and its own machine.
        self._http = httpx.Client(
            base_url=base,
            transport=httpx.HTTPTransport(uds=socket_path, verify=False) if socket_path else None,
            trust_env=not _local(base),
            verify=_secure(base),
        )
        self.bytes_sent = 0
        self.bytes_received = 0

    @contextlib.contextmanager
    def send(self, request: Request, *, timeout: float) -> Iterator[Reply]:
        """See `Transport.send`."""
        with contextlib.ExitStack() as stack:
            with _mapped():
                built = self._http.build_request(
                    request.method,
                    request.path,
                    headers=_headers(request, self._api_key),
                    content=self._counted(request.body()) if request.body else None,
                    timeout=timeout,
                )
                response = self._http.send(built, stream=True)
            stack.callback(response.close)
            yield Reply(response.status_code, response.headers, self._received(response))

    def _counted(self, chunks: Iterator[Chunk]) -> Iterator[bytes]:
        for chunk in chunks:
            self.bytes_sent += len(chunk)
            yield chunk  # type: ignore[misc]  # h11 takes any buffer

    def _received(self, response: httpx.Response) -> Iterator[bytes]:
        with _mapped():
            for chunk in response.iter_raw():
                self.bytes_received += len(chunk)
                yield chunk

    def close(self) -> None:
        """Drop all connections."""
        self._http.close()


class AsyncHttpTransport:
    """The same for asyncio."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        base, socket_path = _target(url)
        self._api_key = api_key
        self._http = httpx.AsyncClient(
            base_url=base,
            transport=httpx.AsyncHTTPTransport(uds=socket_path, verify=False) if socket_path else None,
            trust_env=not _local(base),
            verify=_secure(base),
        )

    async def call(
        self,
        request: Request,
        *,
        timeout: float,
        feed: Callable[[int, Mapping[str, str]], Callable[[bytes], object]],
    ) -> None:
        """Send a request and push the reply's body into the function that ``feed(status, headers)`` returns."""

        async def body(chunks: Iterator[Chunk]) -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk  # type: ignore[misc]

        with _mapped():
            built = self._http.build_request(
                request.method,
                request.path,
                headers=_headers(request, self._api_key),
                content=body(request.body()) if request.body else None,
                timeout=timeout,
            )
            response = await self._http.send(built, stream=True)
            try:
                take = feed(response.status_code, response.headers)
                async for chunk in response.aiter_raw():
                    take(chunk)
            finally:
                await response.aclose()

    async def close(self) -> None:
        """Drop all connections."""
        await self._http.aclose()


class FakeTransport:
    """Answers from a function instead of a network; for tests of code that uses Nowcast.

    Args:
        handler: Request -> (status, headers, body).
    """

    def __init__(self, handler: Callable[[Request], tuple[int, Mapping[str, str], bytes]]) -> None:
        self._handler = handler
        self.requests: list[Request] = []

    @contextlib.contextmanager
    def send(self, request: Request, *, timeout: float) -> Iterator[Reply]:
        """See `Transport.send`."""
        self.requests.append(request)
        status, headers, body = self._handler(request)
        yield Reply(status, {k.lower(): v for k, v in headers.items()}, iter([body] if body else []))

    def close(self) -> None:
        """Nothing to drop."""


class FaultyTransport:
    """Lets chosen requests fail and passes the rest on; for tests.

    Args:
        inner: The transport that does the work.
        fail_at: Number of the request, counted from 0 -> what it meets: an exception to raise before sending, or one
            of ``"before"`` (never sent), ``"after"`` (sent and served, the reply lost), ``"body"`` (the reply breaks
            off half-way).
    """

    def __init__(self, inner: Transport, fail_at: Mapping[int, Exception | str]) -> None:
        self._inner = inner
        self._fail_at = dict(fail_at)
        self.count = 0

    @contextlib.contextmanager
    def send(self, request: Request, *, timeout: float) -> Iterator[Reply]:
        """See `Transport.send`."""
        fault = self._fail_at.get(self.count)
        self.count += 1
        if isinstance(fault, Exception):
            raise fault
        if fault == "before":
            raise ConnectFailed("injected: nobody answers")
        with self._inner.send(request, timeout=timeout) as reply:
            if fault == "after":
                for _ in reply.chunks:
                    pass
                raise ConnectionCut("injected: the reply was lost")
            if fault == "body":
                reply = Reply(reply.status, reply.headers, _broken(reply.chunks))
            yield reply

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()


def _broken(chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk[: len(chunk) // 2]
        raise ConnectionCut("injected: the reply broke off")
    raise ConnectionCut("injected: the reply broke off")


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
        return min(self.cap, wanted) * (1.0 + self.jitter * random.random())


RETRYABLE = (TransportError, Busy, Unavailable, ChecksumMismatch, MalformedFrame, BadReply, InternalError)
"""Errors after which the same request may succeed: every call of the protocol is idempotent."""


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> NowcastError:
    """The typed error in a reply that is not a success."""
    try:
        retry_after: float | None = float(headers.get("retry-after", ""))
    except ValueError:
        retry_after = None
    try:
        parsed = ErrorBody.model_validate_json(body)
    except ValidationError:
        # Something between us and the service answered.
        if status in (429, 502, 503, 504):
            return Unavailable(f"status {status} from a gateway", retry_after=retry_after)
        return BadReply(
            f"status {status} with a body that is no error of the protocol",
            expected="an error body in JSON",
            remedy="check that the url is a Nowcast service's",
        )
    return NowcastError.from_body(parsed, retry_after=retry_after)


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
                reply.chunks = _until(reply.chunks, deadline, stop)
                return read(checked(reply))
        except RETRYABLE as exc:
            pause = retry.delay(attempt, exc)
            if attempt >= retry.attempts or time.monotonic() + pause >= deadline or stop.wait(pause):
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
