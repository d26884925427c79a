"""One connection: uvicorn's HTTP parser with what it lacks, bounds on everything that needs no key.

Whoever can connect can send bytes, and most of them are taken before the key is looked at: heads, the framing of
chunks, trailers, bodies of requests that were refused, bytes after an upgrade, or none at all. In every state of the
parser there is a bound on bytes and on time, and a `Door` bounds how many connections there are. What the application
reads of a body has bounds of its own, see `nowcast_service.http.bodies`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httptools
from nowcast_proto.errors import Unavailable
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

log = logging.getLogger(__name__)

MAX_HEAD = 1 << 16
"""Bytes in a row that carry no body: a head, chunk sizes and their extensions, trailers; give or take one slice."""
MAX_FIELDS = 100
"""Header fields of a request."""
MAX_PIPELINED = 8
"""Requests that may wait on one connection for the one before them."""
MAX_SPILL = 1 << 26
"""Bytes of a body that are still taken, and thrown away, after its request was answered."""
PACE = 1 << 16
"""Bytes of an answer that a client has to take within `patience` (all that is left, where that is less)."""
_SLICE = 1 << 14
"""Bytes parsed at once while they may be a head, a trailer or framing, so that the bounds are held while they come."""


def _full() -> bytes:
    body = (
        Unavailable("all connections are in use", remedy="try again after Retry-After")
        .body()
        .model_dump_json()
        .encode()
    )
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


_FULL = _full()


class _Refused(Exception):  # the parser turns it into its own error
    """Raised inside a callback of the parser: it stops at once."""


class Door:
    """All connections of one server, oldest first, and no more than a number of them.

    Where one more comes, the oldest that no accepted request is under way on has to go: connections that hold their
    place without a word cannot keep others out.

    Args:
        most: Connections at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._inside)

    def enter(self, newcomer: Connection) -> bool:
        """Let one in; False where all others are being served and there is no room."""
        if len(self._inside) >= self._most:
            idle = next((other for other in self._inside if not other.served), None)
            if idle is None:
                return False
            self.leave(idle)
            idle.transport.abort()
        self._inside[newcomer] = None
        return True

    def leave(self, one: Connection) -> None:
        """One is gone; safe to call more than once."""
        self._inside.pop(one, None)


class Connection(HttpToolsProtocol):
    """HTTP/1.1 with bounds.

    Args:
        config: uvicorn's.
        server_state: uvicorn's.
        app_state: State of the application's lifespan.
        door: Who else is connected.
        patience: Seconds for a head, for the rest of a body nobody reads any more, for a client to take `PACE` bytes
            of an answer, and for the connection to close.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        door: Door,
        patience: float,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._door = door
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._in_body = False
        self._deaf = False  # after an upgrade nothing more is parsed
        self._dry = 0  # bytes since the last one of a body
        self._fields = 0
        self._spilt = 0
        self._since: dict[str, float] = {}  # what is being waited for -> since when
        self._unsent = 0

    @property
    def served(self) -> bool:
        """Whether a request whose key was accepted is under way."""
        cycle = self.cycle
        if cycle is None or "nowcast_tenant" not in cycle.scope:
            return False
        return not cycle.response_complete or self.transport.get_write_buffer_size() > 0

    # What comes from the event loop

    def connection_made(self, transport: Any) -> None:
        """A client has connected; its first head is awaited."""
        super().connection_made(transport)
        if not self._door.enter(self):
            transport.write(_FULL)
            transport.close()
        self._since["head"] = self.loop.time()
        self._timer = self.loop.call_later(self._patience / 4, self._watch)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._door.leave(self)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        self._unset_keepalive_if_required()
        if not self._in_head and not self._in_body:
            self._since.setdefault("head", self.loop.time())  # one byte between two requests, and a head has begun
        rest = memoryview(data)
        while rest and not self._deaf and not self.transport.is_closing():
            piece = rest if self._in_body and not self._dry else rest[:_SLICE]
            rest = rest[len(piece) :]
            self._dry += len(piece)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade:
                self._deaf = True  # answered as HTTP/1.1, as if it had not been asked for; then the end
                self.cycle.keep_alive = False
            except httptools.HttpParserError as exc:
                self._refuse("Invalid HTTP request received.", exc)
            else:
                if self._dry > MAX_HEAD:
                    self._refuse("The request's head, framing or trailers are too long.")

    def resume_writing(self) -> None:
        """What was to be sent is nearly all sent."""
        self._since.pop("unsent", None)
        super().resume_writing()

    # What comes from the parser

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head, self._dry, self._fields = True, 0, 0
        self._since.setdefault("head", self.loop.time())

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field, or a field of a trailer: nobody reads those."""
        if not self._in_head:
            return
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise _Refused("too many header fields")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head is whole."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _Refused("too many requests at once")
        self._in_head, self._in_body, self._dry, self._spilt = False, True, 0, 0
        self._since.pop("head", None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        self._dry = 0
        if self.cycle.response_complete:
            self._spilt += len(body)
            if self._spilt > MAX_SPILL:
                self.transport.abort()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._in_body, self._dry = False, 0
        self._since.pop("spill", None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request was answered, perhaps before it was whole."""
        if self._in_body and self.cycle.response_complete:
            self._since["spill"] = self.loop.time()
        super().on_response_complete()

    # Bounds

    def _refuse(self, why: str, cause: Exception | None = None) -> None:
        log.debug("a connection is refused: %s (%s)", why, cause)
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started:
            self.transport.abort()  # in the middle of an answer nothing else can be said
        elif not self.transport.is_closing():
            self.send_400_response(why)

    def _watch(self) -> None:
        """Look at what is waited for; end the connection where it takes too long."""
        now = self.loop.time()
        if self.transport.is_closing():
            self._since.setdefault("closing", now)
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            self._since.pop("unsent", None)
        elif "unsent" not in self._since or unsent <= self._unsent - PACE:
            self._since["unsent"], self._unsent = now, unsent
        late = [what for what, since in self._since.items() if now - since > self._patience]
        if late:
            log.debug("a connection is cut: %s", late[0])
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(self._patience / 4, self._watch)
