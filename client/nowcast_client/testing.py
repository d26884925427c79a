"""Transports for tests: one that answers from a function, one that lets chosen requests fail."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from nowcast_client.errors import ConnectFailed, ConnectionCut
from nowcast_client.wire.transport import Reply, Request, Transport


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
