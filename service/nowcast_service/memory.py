"""Giving memory back to the system."""

from __future__ import annotations

import ctypes
import sys
import time

_QUIET = 1.0
"""Seconds after the last release before the heap is gone through: whoever asks again at once finds it as it was."""


class Trimmer:
    """Hands the C heap's free pages back to the system after large blocks were freed.

    Answers of a few MiB come from the heap, which keeps what is freed; a service that has once been busy would stay
    large for ever. Does nothing where the C library has no ``malloc_trim``.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        self._freed: float | None = None

    def freed(self) -> None:
        """Note that something large was freed, or is about to be. From any thread."""
        self._freed = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether there is something to hand back, and it has been quiet for long enough."""
        return self._trim is not None and self._freed is not None and time.monotonic() - self._freed >= _QUIET

    def run(self) -> None:
        """Hand the free pages back; takes milliseconds, without the interpreter lock."""
        self._freed = None
        if self._trim is not None:
            self._trim(0)
