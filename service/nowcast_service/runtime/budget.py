"""Bytes that may be reserved."""

from __future__ import annotations

import threading


class Budget:
    """Bytes that may be reserved, in all. Thread-safe."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        return self._used

    def reserve(self, nbytes: int) -> Reservation | None:
        """Reserve bytes; None when there are not that many left."""
        return Reservation(self, nbytes) if self._take(nbytes) else None

    def _take(self, nbytes: int) -> bool:
        with self._lock:
            if nbytes > 0 and self._used + nbytes > self.total:
                return False
            self._used += nbytes
        return True


class Reservation:
    """A share of a `Budget`, given back once."""

    def __init__(self, budget: Budget, nbytes: int) -> None:
        self._budget = budget
        self.nbytes = nbytes
        self._lock = threading.Lock()

    def resize(self, nbytes: int) -> bool:
        """Make it this large; False, and nothing changed, when there is not that much left."""
        with self._lock:
            if not self._budget._take(nbytes - self.nbytes):
                return False
            self.nbytes = nbytes
        return True

    def release(self) -> None:
        """Give the bytes back; safe to call more than once."""
        self.resize(0)
