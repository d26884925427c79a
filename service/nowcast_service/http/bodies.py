"""Request bodies in and tensor streams out, chunk by chunk, without holding up the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request
from nowcast_proto.errors import DeadlineExceeded, InvalidRequest, TooLarge
from nowcast_proto.messages import read_json
from nowcast_proto.stream import Decoder, Encoder
from nowcast_proto.tensors import MUCH
from nowcast_proto.version import MEDIA_TYPE, version_of_media_type
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nowcast_service.runtime.long_messages import no_collection
from nowcast_service.runtime.service import Service

LEAST_RATE = 4096
"""Bytes a second below which a body is a trickle: it would hold its place for as long as its sender likes."""
M = TypeVar("M", bound=BaseModel)

_SHORT = 1 << 15
"""Bytes of JSON that are parsed where they are: that takes a few milliseconds."""
_PARSED = 24
"""Bytes that parsing one byte of JSON takes, as objects of Python and of the message."""
_BATCH = 1 << 19
"""Bytes checked per trip to a thread: enough to make the trip cheap, little enough to keep memory flat."""


def check_media_type(request: Request) -> None:
    """Hold a body to this protocol's media type.

    Raises:
        UnsupportedVersion: It is of a version that is not served.
        InvalidRequest: It is something else.
    """
    value = request.headers.get("content-type", "")
    if version_of_media_type(value) is None:
        raise InvalidRequest(f"the body's Content-Type is {value[:80]!r}", expected=MEDIA_TYPE)


async def pieces(request: Request, idle: float) -> AsyncGenerator[bytes, None]:
    """The body as it arrives.

    Args:
        request: Whose body.
        idle: Seconds without a byte after which it is given up; so is one that brings less than `LEAST_RATE` over them.

    Raises:
        DeadlineExceeded: Nothing came for that long, or too little.
        ClientDisconnect: The client went away.
    """
    loop = asyncio.get_running_loop()
    stream = request.stream()
    since, came = loop.time(), 0
    try:
        async with asyncio.timeout(idle) as timeout:
            async for piece in stream:
                timeout.reschedule(None)
                came += len(piece)
                if (seconds := loop.time() - since) >= idle:
                    if came < LEAST_RATE * seconds:
                        raise DeadlineExceeded(
                            f"the body comes at {came / seconds:.0f} bytes a second",
                            expected=f"at least {LEAST_RATE} a second, over {idle:g} s",
                            remedy="resume the upload when the connection is better",
                        )
                    since, came = loop.time(), 0
                if piece:
                    yield piece
                timeout.reschedule(loop.time() + idle)
    except TimeoutError as exc:
        raise DeadlineExceeded(
            f"no byte of the body came for {idle:g} s", remedy="resume the upload when the connection is better"
        ) from exc


async def read_all(request: Request, *, cap: int, idle: float) -> bytes:
    """A small body, whole.

    Raises:
        TooLarge: It is over the cap; the rest is not read.
        DeadlineExceeded, ClientDisconnect: As `pieces`.
    """
    body = bytearray()
    async with contextlib.aclosing(pieces(request, idle)) as stream:
        async for piece in stream:
            body += piece
            if len(body) > cap:
                raise TooLarge("the body is too long", expected=f"at most {cap} bytes of JSON")
    return bytes(body)


async def read_model(request: Request, service: Service, tenant: str, model: type[M], *, cap: int | None = None) -> M:
    """A JSON body as the message it is, read by another process where it is long.

    What parsing takes is paid for while it takes it.

    Args:
        request: Whose body.
        service: Budgets and settings.
        tenant: Who pays.
        model: What the body is.
        cap: Bytes, where less than the setting.

    Raises:
        TooLarge: It is over the cap, or too much would be needed to parse it.
        InvalidSpec, InvalidRequest: It is not such a message.
        Busy: There is no room to parse it now.
        DeadlineExceeded, ClientDisconnect: As `pieces`.
    """
    settings = service.settings
    most = min(int(settings.max_json), cap or int(settings.max_json))
    body = await read_all(request, cap=most, idle=settings.upload_idle)
    if len(body) <= _SHORT:
        return read_json(model, body)
    paid = service.sessions.reserve(tenant, _PARSED * len(body), "parsing the body")
    try:
        return await service.reader.read(model, body)
    finally:
        paid.release()
        service.memory.freed()


async def receive_stream(request: Request, decoder: Decoder, *, idle: float, count: Callable[[int], None]) -> None:
    """Feed a body to a decoder.

    All of it is taken in a thread, the decoder's sink included: the header, which may be long, and then the tensors'
    bytes while the next ones arrive; those of a long stream are digested in yet another thread. Whatever ends the body,
    all bytes that arrived have been taken and checked when this returns or raises, so that an upload can resume where
    it stands.

    Args:
        request: Whose body.
        decoder: Takes it; need not be complete at the end.
        idle: Seconds without a byte after which the body is given up.
        count: Called with the number of bytes of each piece.

    Raises:
        NowcastError: What the decoder raised, or the client was silent for too long.
        ClientDisconnect: The client went away.
    """

    def feed(batch: list[bytes]) -> None:
        for piece in batch:
            decoder.feed(piece)

    def begin(piece: bytes) -> None:
        with no_collection():
            decoder.feed(piece)

    batch: list[bytes] = []
    size = 0
    feeding: asyncio.Future[None] | None = None
    digesting = _digesting(decoder)
    try:
        async with contextlib.aclosing(pieces(request, idle)) as stream:
            async for piece in stream:
                count(len(piece))
                if decoder.header is None:
                    feeding = asyncio.ensure_future(asyncio.to_thread(begin, piece))
                    await asyncio.shield(feeding)
                    digesting = _digesting(decoder)
                    continue
                batch.append(piece)
                size += len(piece)
                if size >= _BATCH:
                    if feeding is not None:
                        await feeding
                    feeding = asyncio.ensure_future(asyncio.to_thread(feed, batch))
                    batch, size = [], 0
    finally:
        # Shielded: a cancelled request must not leave a thread writing into a buffer that is about to be reused.
        try:
            if feeding is not None:
                await asyncio.shield(feeding)
            if batch:
                await asyncio.shield(asyncio.to_thread(feed, batch))
        finally:
            if digesting is not None:
                decoder.aside = None
                last = digesting.submit(feed, [b""])  # raises what was found there
                digesting.shutdown(wait=False)
                await asyncio.shield(asyncio.wrap_future(last))


def _digesting(decoder: Decoder) -> ThreadPoolExecutor | None:
    """A thread for the digests of a stream, once its header says that it is worth one."""
    if decoder.header is None or decoder.header.tensor_bytes < MUCH:
        return None
    thread = ThreadPoolExecutor(1, "nowcast-digest")
    decoder.aside = thread.submit
    return thread


async def disconnected(request: Request) -> None:
    """Return once the client has gone away; only after the body was read to its end."""
    while True:
        if (await request.receive())["type"] == "http.disconnect":
            return


class StreamReply(Response):
    """A tensor stream as the answer.

    Args:
        encoder: What to send.
        count: Called with the number of bytes of each chunk sent.
        done: Called once when it ends, with whether the client took it all.
    """

    media_type = MEDIA_TYPE

    def __init__(self, encoder: Encoder, *, count: Callable[[int], None], done: Callable[[bool], None]) -> None:
        super().__init__(status_code=200, headers={"Content-Length": str(encoder.content_length)})
        self._encoder = encoder
        self._count = count
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and then chunk after chunk, as fast as the client takes them."""
        gone = asyncio.ensure_future(disconnected(Request(scope, receive)))
        complete = False
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            left = self._encoder.content_length
            for chunk in self._encoder.chunks():
                left -= len(chunk)
                await send({"type": "http.response.body", "body": bytes(chunk), "more_body": left > 0})
                self._count(len(chunk))
                await asyncio.sleep(0)
                if gone.done() and left > 0:
                    break
            complete = left == 0
        finally:
            gone.cancel()
            self._done(complete)
