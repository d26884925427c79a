"""The process that works on specs, seen from the service: started, started again, ended, and read from.

See `nowcast_service.runtime.spec_process` for the other end.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import socket
import subprocess
import sys
import threading
import time

from nowcast_service.runtime.spec_orders import ORDER

log = logging.getLogger(__name__)

_STOP_SECONDS = 1.0
_OWN_PAGES = 1 << 18
_ENVIRONMENT = {
    # One thread, so that it can be forked, and no device.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "CUDA_VISIBLE_DEVICES": "",
}


class Nursery:
    """A process that forks a child for every order. Thread-safe."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._starting = threading.Lock()
        self._stopped = False
        self._numbers = itertools.count(1)

    def number(self) -> int:
        """One that no order had."""
        return next(self._numbers)

    @property
    def pid(self) -> int | None:
        """Of the process; None before it was started."""
        return self._process.pid if self._process is not None else None

    def control(self) -> socket.socket:
        """The socket to a process that lives; starts one where none does."""
        with self._starting:
            if self._stopped and self._control is not None:
                return self._control
            if self._process is None or self._control is None or self._process.poll() is not None:
                if self._process is not None:
                    log.warning(
                        "the process that works on specs ended with %s; it starts again", self._process.returncode
                    )
                if self._control is not None:
                    self._control.close()
                ours, theirs = socket.socketpair()
                with theirs:
                    self._process = subprocess.Popen(
                        [sys.executable, "-m", "nowcast_service.runtime.spec_process", str(theirs.fileno())],
                        pass_fds=(theirs.fileno(),),
                        stdin=subprocess.DEVNULL,
                        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    )
                self._control = ours
            return self._control

    def tell(self, letter: bytes, number: int, theirs: socket.socket | None = None) -> None:
        """Begin (``S``) or end (``E``) an order.

        Args:
            letter: Which of both.
            number: The order's.
            theirs: The child's end of the link, where one begins.
        """
        control = self.control()
        fds = [] if theirs is None else [theirs.fileno()]
        with contextlib.suppress(OSError):  # it has just ended; whoever waits on the link sees that
            socket.send_fds(control, [ORDER.pack(letter, number)], fds)

    def stop(self) -> None:
        """End the process."""
        self._stopped = True
        with self._starting:
            if self._control is not None:
                self._control.close()  # at which it ends its children, and itself
            if self._process is not None:
                try:
                    self._process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:  # still importing
                    self._process.kill()
                    self._process.wait()


def receive(link: socket.socket, length: int, end: float) -> memoryview:
    """Exactly so many bytes, in memory that goes back to the system.

    Raises:
        TimeoutError: They did not come by then.
        EOFError: The other end closed.
    """
    data = memoryview(mmap.mmap(-1, length) if length > _OWN_PAGES else bytearray(length))
    left = data
    while left:
        link.settimeout(max(0.001, end - time.monotonic()))
        got = link.recv_into(left)
        if not got:
            raise EOFError
        left = left[got:]
    return data
