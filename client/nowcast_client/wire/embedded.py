"""A service of one's own: the same engine and protocol in a child process, over a unix socket.

For notebooks and single machines. The child ends with this process, however this process ends: it holds the reading end
of a pipe whose writing end only this process has. Nothing of the service is imported here.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nowcast_client.errors import AttachError, ConnectFailed
from nowcast_client.wire.address import SOCKET_PATH_BYTES
from nowcast_client.wire.http import HttpTransport
from nowcast_client.wire.transport import Reply, Request

NEEDED = ("nowcast_service", "torch", "torch_geometric", "fastapi", "uvicorn", "typer")
"""What ``pip install nowcast-sidecar[service]`` brings."""
START_SECONDS = 120.0
"""Most seconds a child may take until it listens; most of it is importing torch on a busy machine."""
STOP_SECONDS = 1.0
_TAIL = 600


class EmbeddedTransport:
    """A child process that serves, and the way to it. A `nowcast_client.wire.transport.Transport`.

    Args:
        options: Further options of ``nowcast serve``.

    Raises:
        AttachError: The service is not installed here.
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise AttachError(
                f"url='embedded' needs the service in this environment, and {missing[0]!r} is not installed",
                expected="the service extra",
                remedy="pip install 'nowcast-sidecar[service]', or give the url of a service that runs elsewhere",
            )
        self._pid = os.getpid()
        self._closed = threading.Event()
        self._folder = _short_folder()
        self._socket = self._folder / "socket"
        # A file without a name: it is gone with the last process that holds it.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        reading, self._lifeline = os.pipe()
        # A forked worker must not keep the pipe open after this process has died.
        os.register_at_fork(after_in_child=self._let_go)
        command = [sys.executable, "-m", "nowcast_service.cli", "serve", "--unix-socket", str(self._socket)]
        self.process = subprocess.Popen(
            [*command, "--parent-fd", str(reading), *options],
            pass_fds=(reading,),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            # Keys and addresses of another service are not meant for this one; a Ctrl-C is this process's to handle.
            env={k: v for k, v in os.environ.items() if not k.startswith("NOWCAST_") or k in _PASSED},
            start_new_session=True,
        )
        os.close(reading)
        self._started = time.monotonic()
        self._http = HttpTransport(f"unix://{self._socket}")
        atexit.register(self.close)

    @property
    def bytes_sent(self) -> int:
        """Bytes of request bodies so far."""
        return self._http.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes of replies so far."""
        return self._http.bytes_received

    @contextlib.contextmanager
    def send(self, request: Request, *, timeout: float) -> Iterator[Reply]:
        """See `nowcast_client.wire.transport.Transport.send`; the first request waits for the child to listen."""
        self._await_socket()
        with self._http.send(request, timeout=timeout) as reply:
            yield reply

    def close(self) -> None:
        """End the child."""
        if self._closed.is_set() or os.getpid() != self._pid:
            return
        self._closed.set()
        atexit.unregister(self.close)
        self._http.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        os.close(self._lifeline)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _let_go(self) -> None:
        if not self._closed.is_set():
            with contextlib.suppress(OSError):
                os.close(self._lifeline)

    def _await_socket(self) -> None:
        while not self._socket.exists():
            if self._closed.is_set():
                raise ConnectFailed("the embedded service was closed")
            status = self.process.poll()
            if status is not None:
                raise ConnectFailed(
                    f"the embedded service ended with status {status} before it listened: {self._last_words()}",
                    remedy="run `nowcast serve` by hand to see what is wrong",
                )
            if time.monotonic() - self._started > START_SECONDS:
                raise ConnectFailed(f"the embedded service did not listen within {START_SECONDS:g} s")
            time.sleep(0.05)

    def _last_words(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL))
        return self._log.read().decode(errors="replace").strip()


def _short_folder() -> Path:
    """A new folder whose path leaves room for a socket's: the usual one for temporary files may be too deep for that.

    Raises:
        AttachError: There is none.
    """
    places = (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp")
    room = SOCKET_PATH_BYTES - len("/nowcast-12345678/socket")
    for place in places:
        if place and len(os.fsencode(place)) <= room:
            with contextlib.suppress(OSError):
                return Path(tempfile.mkdtemp(prefix="nowcast-", dir=place))
    raise AttachError(
        f"no folder for temporary files is writable and short enough for a socket: {', '.join(filter(None, places))}",
        expected=f"one of at most {room} bytes",
        remedy="set TMPDIR to a shorter path",
    )


_PASSED = {
    "NOWCAST_CACHE",
    "NOWCAST_CHECKPOINT",
    "NOWCAST_PREDICTOR",
    "NOWCAST_DEVICE",
    "NOWCAST_THREADS",
    "NOWCAST_BUDGET",
    "NOWCAST_LOG_LEVEL",
}
"""Settings that are as good for a child as for any service."""
