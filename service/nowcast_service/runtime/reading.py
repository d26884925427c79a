"""Long JSON bodies, read by a child of the process that works on specs: bounded in time and memory, and killable."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from nowcast_proto.errors import ErrorBody, NowcastError, TooLarge, Unavailable
from pydantic import BaseModel

from nowcast_service.runtime.long_messages import no_collection, put_together
from nowcast_service.runtime.spec_nursery import Nursery, receive
from nowcast_service.runtime.spec_orders import LENGTH, reading_of

M = TypeVar("M", bound=BaseModel)

PARALLEL = 2
"""Bodies read at once; more wait their turn."""
_START_SECONDS = 60.0
_PATIENCE = 3.0
"""Wall-clock seconds per allowed second of processor time."""
_PAUSE = 0.2
"""Seconds until a process that ends is seen to have ended."""
_BYTES_PER_SECOND = 1e6
_MOST = 3
"""A message in pieces has at most so many bytes for each that came."""


class Reader:
    """Reads long bodies.

    Args:
        nursery: The process whose children do it.
        seconds: Of processor time for one body, and one more for each megabyte.
        memory: Bytes for one body.
    """

    def __init__(self, nursery: Nursery, *, seconds: float, memory: int) -> None:
        self._nursery = nursery
        self._seconds = seconds
        self._memory = memory
        self._threads = ThreadPoolExecutor(PARALLEL, "nowcast-read")

    async def read(self, model: type[M], body: bytes) -> M:
        """A body as the message it is.

        Raises:
            InvalidSpec, InvalidRequest: It is not such a message.
            TooLarge: It takes too much time or memory to read.
            Unavailable: The process ended.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, model, body)

    def stop(self) -> None:
        """Take no more; what is being read ends with the process."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, model: type[M], body: bytes) -> M:
        seconds = self._seconds + len(body) / _BYTES_PER_SECOND
        order = reading_of(model, body, seconds=seconds, memory=self._memory)
        for _ in range(2):
            number = self._nursery.number()
            link, theirs = socket.socketpair()
            with contextlib.closing(link):
                try:
                    with theirs:
                        self._nursery.tell(b"S", number, theirs)
                    link.settimeout(_START_SECONDS)
                    link.sendall(order)
                    receive(link, 1, time.monotonic() + _START_SECONDS)
                    return self._answer(model, link, _MOST * len(body), time.monotonic() + _PATIENCE * seconds)
                except TimeoutError as exc:
                    raise _too_much(seconds, self._memory) from exc
                except (OSError, EOFError):  # it may have ended since the last order: a fresh one gets a chance
                    time.sleep(_PAUSE)
                finally:
                    self._nursery.tell(b"E", number)
        raise Unavailable("the process that reads long bodies ended", remedy="try again", retry_after=2.0)

    def _answer(self, model: type[M], link: socket.socket, most: int, end: float) -> M:
        kind = bytes(receive(link, 1, end))
        if kind == b"K":
            raise _too_much(self._seconds, self._memory)
        head = bytes(receive(link, _length(link, most, end), end))
        if kind == b"X":
            raise NowcastError.from_body(ErrorBody.model_validate_json(head))
        with no_collection():
            return put_together(model, head, _pieces(receive(link, _length(link, most, end), end)))


def _length(link: socket.socket, most: int, end: float) -> int:
    (length,) = LENGTH.unpack(receive(link, LENGTH.size, end))
    if length > most + (1 << 16):
        raise EOFError
    return int(length)


def _pieces(data: memoryview) -> Iterator[memoryview]:
    while data:
        (length,) = LENGTH.unpack(data[: LENGTH.size])
        yield data[LENGTH.size : LENGTH.size + length]
        data = data[LENGTH.size + length :]


def _too_much(seconds: float, memory: int) -> TooLarge:
    return TooLarge(
        f"the body takes more than {seconds:.1f} s or {memory} bytes to read",
        expected="a message of a network of the size that is trained",
        remedy="send a shorter one, or raise NOWCAST_SPEC_SECONDS and NOWCAST_SPEC_MEMORY",
    )
