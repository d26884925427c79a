"""What subcommands share: logging, a progress bar, sizes."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nowcast_proto.errors import InvalidRequest

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def set_up_logging(verbose: bool) -> None:
    """Warnings on stderr, with ``verbose`` everything from INFO on."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="nowcast: %(message)s")
    logging.getLogger("nowcast_service").setLevel(logging.INFO if verbose else logging.WARNING)


def parse_bytes(text: str) -> int:
    """Bytes from ``1500000``, ``512M``, ``2G`` or ``2GiB`` (powers of 1024).

    Raises:
        InvalidRequest: Not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None or not float(match[1]):
        raise InvalidRequest(f"{text!r} is not a size", expected="bytes, or a number with K, M, G or T")
    return int(float(match[1]) * _UNITS[match[2]])


@contextmanager
def progress_bar(label: str, *, unit_bytes: bool = False) -> Iterator[Callable[[int, int | None], None] | None]:
    """A bar on stderr fed with (done, total); None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    amount = DownloadColumn() if unit_bytes else TaskProgressColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=None)

    def advance(done: int, total: int | None) -> None:
        bar.start()  # only now: work that needs no time shows no bar
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()
