"""What predictors want back at a session's next nowcast: set by the device's thread, put back by the event loop."""

from __future__ import annotations

import threading
from typing import Any

from nowcast_service.runtime.catalogue import Key


class States:
    """The state of each predictor of one session. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Key, Any] = {}
        self._closed = False

    def get(self, key: Key) -> Any:
        """The state to predict from; None before the first nowcast."""
        with self._lock:
            return self._held.get(key)

    def put(self, key: Key, state: Any) -> None:
        """The state from now on; nothing is kept of a session that was dropped."""
        with self._lock:
            if not self._closed:
                self._held[key] = state

    def close(self) -> None:
        """Drop all, also what is still being computed."""
        with self._lock:
            self._closed = True
            self._held.clear()
