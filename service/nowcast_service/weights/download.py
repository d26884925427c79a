"""Fetching one large file over connections that may break, by one process at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import httpx
from nowcast_proto.errors import NotFound, TooLarge, Unavailable

log = logging.getLogger(__name__)

MAX_BYTES = 256 << 20
ATTEMPTS = 5
"""Attempts in a row that bring nothing before a download is given up."""
Progress = Callable[[int, int | None], None]
"""Called with (bytes so far, bytes in all or None)."""


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """The file at ``path`` for appending and truncating, held by one process at a time."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:  # the one who held it has renamed it to its final name
                same = False
            if same:
                try:
                    yield file
                finally:
                    file.flush()
                    if path.exists() and not path.stat().st_size:
                        path.unlink()
                return


def download(address: str, part: BinaryIO, progress: Progress | None, *, timeout: float, pause: float) -> None:
    """Append to ``part`` until the server has no more, over as many connections as bring something."""
    fruitless = 0
    with httpx.Client(follow_redirects=True, timeout=timeout, headers={"Accept-Encoding": "identity"}) as client:
        while True:
            have = part.seek(0, os.SEEK_END)
            try:
                if _request(client, address, part, have, progress):
                    return
                reason = "the connection ended early"
            except httpx.InvalidURL as exc:
                raise Unavailable(f"{address} is no URL: {exc}", remedy="correct NOWCAST_WEIGHTS_URL") from exc
            except httpx.HTTPError as exc:
                reason = str(exc) or type(exc).__name__
            part.flush()
            gained = part.seek(0, os.SEEK_END) > have
            fruitless = 0 if gained else fruitless + 1
            if fruitless >= ATTEMPTS:
                raise Unavailable(
                    f"{address} could not be fetched: {reason}",
                    remedy="check the network or set NOWCAST_WEIGHTS_URL; what has come so far is kept",
                    retry_after=60,
                )
            log.info("%s: %s, going on from byte %d", address, reason, part.tell())
            if fruitless:
                time.sleep(pause * 2 ** (fruitless - 1))


def _request(client: httpx.Client, address: str, part: BinaryIO, have: int, progress: Progress | None) -> bool:
    """One connection. Returns whether the file is complete now."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    with client.stream("GET", address, headers=headers) as reply:
        if reply.status_code == 416:  # nothing beyond what is here: either all of it, or something else altogether
            return True
        if reply.status_code == 404:
            raise NotFound(f"{address} does not exist", remedy="check NOWCAST_WEIGHTS_URL")
        if reply.status_code in (408, 425, 429) or reply.status_code >= 500:
            raise httpx.HTTPError(f"the server answered {reply.status_code}")
        if reply.status_code not in (200, 206):
            raise Unavailable(f"{address}: the server answered {reply.status_code}", expected="200 or 206")
        start = 0
        if reply.status_code == 206:
            start = _range_start(reply.headers.get("Content-Range", ""))
            if start != have:
                raise Unavailable(f"{address}: the server sent bytes from {start}", expected=f"from {have}")
        else:
            part.truncate(0)  # the server does not do ranges
        length = reply.headers.get("Content-Length", "")
        total = start + int(length) if length.isascii() and length.isdigit() else None
        if (total or 0) > MAX_BYTES:
            raise TooLarge(f"{address} has {total} bytes", expected=f"at most {MAX_BYTES}")
        done = start
        for block in reply.iter_raw():  # as it comes: a chunk held back would be lost when the connection breaks
            done += len(block)
            if done > MAX_BYTES:
                part.truncate(0)
                raise TooLarge(f"{address} has more than {MAX_BYTES} bytes", expected=f"at most {MAX_BYTES}")
            part.write(block)
            if progress:
                progress(done, total)
        part.flush()
        return total is None or done == total


def _range_start(content_range: str) -> int:
    unit, _, span = content_range.partition(" ")
    first = span.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else -1
