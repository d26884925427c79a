"""The compose file brought up for a test, and a training job that uses it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ...ports import free_port

ROOT = Path(__file__).resolve().parents[3]
HOW = (
    'start Docker, or on Debian or Ubuntu as root: eval "$(bash .ci/engine.sh)", which installs and starts an engine '
    "and makes a base image"
)


def works(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def compose_command() -> list[str] | None:
    """``NOWCAST_COMPOSE``, else Compose v2, else v1; None where there is none."""
    if chosen := os.environ.get("NOWCAST_COMPOSE"):
        return shlex.split(chosen)
    if works("docker", "compose", "version"):
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


class Stack:
    """The compose file, brought up under a name and on a port of its own."""

    def __init__(self, command: list[str], name: str, settings: dict[str, str]) -> None:
        self.port = free_port()
        self.name = name
        self.image = "nowcast:test"
        self._command = [*command, "-p", name]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("NOWCAST_") or k in _BUILD}
        self._environment = {
            **clean,
            **settings,
            "NOWCAST_IMAGE": self.image,
            "NOWCAST_PUBLISH_PORT": str(self.port),
            "NOWCAST_THREADS": "1",
        }

    @property
    def url(self) -> str:
        """Where the service is published."""
        return f"http://127.0.0.1:{self.port}"

    def __call__(self, *arguments: str, timeout: float = 120, check: bool = True) -> str:
        """Run one compose command; returns its standard output."""
        done = subprocess.run(
            [*self._command, *arguments],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{shlex.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout

    def container(self) -> str:
        """Id of the service's container, running or not."""
        found = docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={self.name}")
        assert found, "the service has no container"
        return found.split()[0]

    def wait_healthy(self, timeout: float = 120) -> None:
        """Wait until the engine's own health check has passed."""
        deadline = time.monotonic() + timeout
        state = ""
        while time.monotonic() < deadline:
            state = docker("inspect", "-f", "{{.State.Status}} {{.State.Health.Status}}", self.container())
            if state == "running healthy":
                return
            time.sleep(0.5)
        pytest.fail(f"not healthy within {timeout:.0f} s but {state!r}: {self('logs', '--tail', '20', check=False)}")

    def wait_ready(self, timeout: float = 120) -> None:
        """Wait until the service itself answers; sooner than the engine's next look."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                if get(f"{self.url}/readyz")[0] == 200:
                    return
            except OSError:
                time.sleep(0.1)
        pytest.fail(f"not ready within {timeout:.0f} s: {self('logs', '--tail', '20', check=False)}")


_BUILD = ("NOWCAST_BASE_IMAGE", "NOWCAST_BUILD_IMAGE", "NOWCAST_BUILD_NETWORK", "NOWCAST_TORCH_ARGS")


def docker(*arguments: str, timeout: float = 60, check: bool = True) -> str:
    """Run one docker command; returns its standard output."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    if check:
        assert done.returncode == 0, f"docker {shlex.join(arguments)}: {done.stderr[-4000:]}"
    return done.stdout.strip()


def get(url: str, key: str | None = None) -> tuple[int, bytes]:
    """GET; returns status and body, whatever the status."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class Trainer:
    """The demo's training job as a process on this machine, its events as they come.

    Args:
        url: The service.
        on_event: Called with every event. While a thread it returns is alive, the job is held (SIGSTOP).
        api_key: Key of the service.
        options: Command-line options.
    """

    def __init__(
        self,
        url: str,
        on_event: Callable[[dict[str, Any]], object] | None = None,
        *,
        api_key: str | None = None,
        **options: object,
    ) -> None:
        self.events: list[dict[str, Any]] = []
        arguments = [part for k, v in options.items() for part in (f"--{k}", str(v))]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("NOWCAST_")}
        if api_key:
            environment["NOWCAST_API_KEY"] = api_key
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nowcast_lab.demo.training_job", "--events", "--url", url, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(self._process.stderr or ()), daemon=True)
        reader.start()
        for line in self._process.stdout or ():
            event = json.loads(line)
            self.events.append(event)
            until = on_event(event) if on_event else None
            if isinstance(until, threading.Thread):
                self._process.send_signal(signal.SIGSTOP)
                until.join()
                self._process.send_signal(signal.SIGCONT)
        self.status = self._process.wait()
        reader.join()
        self.errors = "".join(errors)

    @property
    def report(self) -> dict[str, Any]:
        """The hook's summary."""
        assert self.events, self.errors
        assert self.events[-1]["event"] == "end", self.errors
        report: dict[str, Any] = self.events[-1]["report"]
        return report

    def steps_of(self, kind: str) -> list[int]:
        """Steps of all events of the hook of one kind."""
        return [event["step"] for event in self.events if event["event"] == "nowcast" and event["kind"] == kind]
