"""A real server in its own process, a proxy that breaks connections, and a small training."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nowcast_client import attach
from nowcast_client.handle import Event
from nowcast_client.wire.transport import Retry
from torch import nn

from ...ports import free_port

QUICK = Retry(attempts=4, base=0.01, cap=0.3)


@dataclass
class Server:
    """``nowcast serve`` on a port of its own, which it keeps over restarts."""

    folder: Path
    port: int = field(default_factory=free_port)
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self) -> Server:
        """Start it and wait until it listens."""
        self.starts += 1
        announced = self.folder / f"url{self.starts}"
        log = (self.folder / f"log{self.starts}").open("wb")
        arguments = ("--predictor", "linear", "--port", str(self.port), "--port-file", str(announced))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nowcast_service.cli", "serve", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
            stdout=log,
            stderr=log,
        )
        deadline = time.monotonic() + 120
        while not (announced.exists() and announced.read_text().strip()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / f"log{self.starts}").read_text())
            time.sleep(0.02)
        self.port = int(announced.read_text().strip().rsplit(":", 1)[1])
        return self

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(30)

    def stop(self) -> None:
        """End it in whatever state it is."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Plan:
    """What befalls one connection.

    Attributes:
        direction: ``up`` (requests) or ``down`` (replies).
        at: Bytes let through before it happens.
        flip: Flip this bit of the byte there instead of cutting.
        reset: End with a reset instead of an orderly close.
    """

    direction: str
    at: int
    flip: int | None = None
    reset: bool = False


class Proxy:
    """A TCP proxy. Connections take the plans in order; without one they pass untouched.

    Args:
        port: Where the server listens.
        watch: Called with the direction and every piece of data before it is passed on.
    """

    def __init__(self, port: int, watch: Callable[[str, bytes], None] | None = None) -> None:
        self._port = port
        self._watch = watch
        self.plans: list[Plan] = []
        self.connections = 0
        self.struck = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            plan = self.plans.pop(0) if self.plans else None
            try:
                server = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                client.close()
                continue
            ends = (client, server)
            for end in ends:  # small pieces are passed on at once
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pump, args=(client, server, "up", plan, ends), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, "down", plan, ends), daemon=True).start()

    def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        direction: str,
        plan: Plan | None,
        ends: tuple[socket.socket, socket.socket],
    ) -> None:
        passed = 0
        mine = plan is not None and plan.direction == direction
        try:
            while data := source.recv(1 << 16):
                if self._watch is not None:
                    self._watch(direction, data)
                if mine and plan is not None and passed + len(data) > plan.at:
                    at = plan.at - passed
                    self.struck += 1
                    mine = False
                    if plan.flip is None:
                        sink.sendall(data[:at])
                        self._end(ends, reset=plan.reset)
                        return
                    data = data[:at] + bytes([data[at] ^ (1 << plan.flip)]) + data[at + 1 :]
                passed += len(data)
                sink.sendall(data)
        except OSError:
            pass
        self._end(ends, reset=False)

    @staticmethod
    def _end(ends: tuple[socket.socket, socket.socket], *, reset: bool) -> None:
        for end in ends:
            try:
                if reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # The other thread may be waiting in recv: only a shutdown wakes it, and until then nothing is closed.
                end.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
            except OSError:
                pass
            end.close()


class Job:
    """A small regression, the same from every start."""

    def __init__(self, url: str | None, **kwargs: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.x = torch.randn(64, 6)
        self.y = self.x.sum(1, keepdim=True).sin()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.events: list[Event] = []
        self.slowest = 0.0
        options = {"period": 50, "trial": False, "wait": 30.0, "retry": QUICK, "timeout": 20.0, "update_scale": 0.1}
        self.handle = attach(
            self.model,
            self.optimizer,
            url,
            on_event=self.events.append,
            mode="on" if url else "off",
            **{**options, **kwargs},  # type: ignore[arg-type]
        )

    def run(self, steps: int) -> Job:
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.model(self.x), self.y)
            loss.backward()
            self.handle.observe(loss)
            before = self.handle.summary()["hook_seconds"]
            self.optimizer.step()
            self.slowest = max(self.slowest, self.handle.summary()["hook_seconds"] - before)
        return self

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).clone()

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)
