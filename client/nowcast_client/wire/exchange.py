"""How the requests of one session are made: under which name, how often, until when, and who answered."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

from nowcast_proto.errors import DeadlineExceeded, NowcastError
from nowcast_proto.version import HEADER_INSTANCE, HEADER_SESSION, JSON_TYPE

from nowcast_client.wire import traces
from nowcast_client.wire.transport import Reply, Request, Retry, Transport, call, json_body

log = logging.getLogger("nowcast")
T = TypeVar("T")


class Instances:
    """Which processes of the service answered; one that answers again after another did shares a balancer with it.

    A restart brings a new instance too, but the old one never comes back.
    """

    def __init__(self) -> None:
        self._seen: list[str] = []
        self._told = False

    def note(self, headers: Mapping[str, str]) -> None:
        """Look at a reply's headers; says once what is wrong."""
        instance = headers.get(HEADER_INSTANCE.lower(), "")[:64]
        if not instance or (self._seen and self._seen[-1] == instance):
            return
        if instance in self._seen and not self._told:
            self._told = True
            log.warning(
                "answers come from more than one instance of the service (%s): a balancer in between asks several in "
                "turn, and each knows only a part of this training's session; let it route by the header %s",
                ", ".join(self._seen[-2:]),
                HEADER_SESSION,
            )
        self._seen = [*self._seen[-15:], instance]


class Exchange:
    """One session's requests.

    Args:
        transport: Where the service is.
        timeout: Seconds without progress after which a request is tried again.
        retry: How often it is.
        stop: Set to end everything early.

    Attributes:
        trouble: Why the service could not be reached at the last try; empty where it could.
    """

    def __init__(self, transport: Transport, timeout: float, retry: Retry, stop: threading.Event | None) -> None:
        self.transport = transport
        self.timeout = timeout
        self.retry = retry
        self.stop = stop
        self.trouble = ""
        self._answered_by = Instances()

    def call(
        self,
        session: str,
        method: Literal["GET", "PUT", "POST", "DELETE"],
        path: str,
        deadline: float,
        read: Callable[[Reply], T],
        *,
        body: bytes | None = None,
        retry: Retry | None = None,
        timeout: float | None = None,
    ) -> T:
        """Make a request with at most a JSON document in it.

        Args:
            session: The session's id, by which a balancer may route.
            method: HTTP method.
            path: Path and query.
            deadline: ``time.monotonic()`` after which to give up.
            read: Reads the reply.
            body: The document.
            retry: How often to try; as in all requests by default.
            timeout: Seconds without progress; as in all requests by default.

        Raises:
            NowcastError: What the last try met.
        """
        headers, make, length = {}, None, 0
        if body is not None:
            headers["Content-Type"] = JSON_TYPE
            make, length = json_body(body)
        request = Request(method, path, headers, make, length)
        return self.send(session, request, deadline, read, retry=retry or self.retry, timeout=timeout)

    def send(
        self,
        session: str,
        request: Request,
        deadline: float,
        read: Callable[[Reply], T],
        *,
        retry: Retry,
        timeout: float | None = None,
    ) -> T:
        """Make any request; see `call`."""
        headers = {HEADER_SESSION: session, **request.headers, **traces.headers()}
        return call(
            self.transport,
            Request(request.method, request.path, headers, request.body, request.content_length),
            read,
            timeout=timeout or self.timeout,
            deadline=deadline,
            retry=retry,
            stop=self.stop,
            note=self._heard,
        )

    def pause(self, attempt: int, deadline: float, error: NowcastError | None = None) -> None:
        """Wait before the next try.

        Args:
            attempt: Tries so far.
            deadline: ``time.monotonic()`` after which there is none.
            error: What the last one met; raised where no time is left.

        Raises:
            NowcastError: No time is left, or everything is to end.
        """
        seconds = self.retry.delay(attempt, error or NowcastError("a pause"))
        if time.monotonic() + seconds >= deadline or (self.stop or threading.Event()).wait(seconds):
            raise error or DeadlineExceeded("the service did not come back in time")

    def _heard(self, headers: Mapping[str, str]) -> None:
        self.trouble = ""
        self._answered_by.note(headers)
