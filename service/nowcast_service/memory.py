"""Giving memory back to the system."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable

_EVERY = 1.0


def trimmer() -> Callable[[], None]:
    """A function that hands the C heap's free pages back to the system, once a second at most.

    Answers of a few MiB come from the heap, which keeps what is freed; a service that has once been busy would stay
    large for ever. Does nothing where the C library has no ``malloc_trim``.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    last = 0.0

    def run() -> None:
        nonlocal last
        if trim is not None and time.monotonic() - last >= _EVERY:
            trim(0)
            last = time.monotonic()

    return run
