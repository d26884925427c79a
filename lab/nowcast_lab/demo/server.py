"""The service as a process of its own, so that it can be killed like one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from nowcast_proto.errors import Unavailable

START_SECONDS = 120.0
"""How long a start may take: importing PyTorch on a busy machine is most of it."""


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment without any Nowcast setting but those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NOWCAST_")}
    return {**kept, **settings}


class Server:
    """``nowcast serve`` on a free port of this machine; a context manager that ends it.

    Args:
        folder: Where its log and the file with its address go.
        settings: Settings by their environment names, without the prefix.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        self._folder = folder
        self._settings = {f"NOWCAST_{name.upper()}": value for name, value in settings.items()}
        self._address = folder / "server.url"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def log(self) -> Path:
        """Where it logs to, all its lives together."""
        return self._folder / "server.log"

    def start(self) -> None:
        """Start it, at its old address if it had one, and wait until it is ready.

        Raises:
            Unavailable: It ended at once or was not ready in time; the message ends with the last lines of its log.
        """
        self._address.unlink(missing_ok=True)
        environment = clean_environment(
            **self._settings,
            NOWCAST_HOST="127.0.0.1",
            NOWCAST_PORT=self.url.rpartition(":")[2] if self.url else "0",
            NOWCAST_PORT_FILE=str(self._address),
        )
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nowcast_service.cli", "serve"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self._failed(f"the service ended with status {self._process.returncode} as it started")
            if self._address.exists() and (url := self._address.read_text().strip()):
                self.url = url
                if self._ready():
                    return
            time.sleep(0.1)
        self.kill()
        raise self._failed(f"the service was not ready within {START_SECONDS:.0f} s")

    def _ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/readyz", timeout=10) as reply:
            return bool(reply.status == 200)
        return False

    def _failed(self, what: str) -> Unavailable:
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        return Unavailable(f"{what}:\n{tail}", remedy=f"read {self.log}")

    def kill(self) -> None:
        """End it with SIGKILL: no goodbye, no cleaning up."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """End it with SIGTERM, and with SIGKILL if that takes too long."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
