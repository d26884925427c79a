"""Trainings while everything goes wrong around them, at random: ``python -m tests.e2e.chaos --seconds 1800``.

Four trainings, two of them behind nginx, use one service, which is killed, stopped, cut off, denied memory or denied
room on its disk, again and again. In the end every training must have ended by itself, without an exception, with the
losses of a run alone where nothing was patched, and nothing may be left behind: no thread, no connection, no session.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..integration.client.harness import Server
from ..integration.client.nginx import Nginx, certificate_in

TRAININGS = 4
MiB = 1 << 20


# ----------------------------------------------------------------------- a training


def training(url: str, seed: int, mode: str) -> dict[str, Any]:
    """A small training until stdin ends, then the same steps alone; what became of it as plain data."""
    import torch
    from nowcast_client import attach
    from torch import nn

    torch.set_num_threads(1)

    def made() -> tuple[nn.Module, torch.optim.Optimizer, torch.Generator]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3), torch.Generator().manual_seed(seed)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, draws: torch.Generator, heard: Any) -> float:
        x = torch.randn(32, 16, generator=draws)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin())
        loss.backward()
        heard(loss)
        optimizer.step()
        return float(loss.detach())

    losses: list[float] = []
    parts = made()
    with attach(
        *parts[:2], url, period=60, mode=mode, timeout=2.0, nowcast_timeout=20.0, predictor="linear", max_horizon=5
    ) as handle:
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        while not select.select([sys.stdin], [], [], 0)[0]:
            losses.append(step(*parts, handle.observe))
            time.sleep(0.005)
        handle.close(10.0)
        told = handle.summary()
    threads = [one.name for one in threading.enumerate() if one is not threading.main_thread()]
    sockets = [link for link in map(_target, Path("/proc/self/fd").iterdir()) if link.startswith("socket:")]
    parts = made()
    alone = [step(*parts, lambda loss: None) for _ in losses]
    return {
        "steps": len(losses),
        "as_alone": losses == alone,
        "left": threads + sockets,
        **{name: told[name] for name in ("mode", "asked", "arrived", "patched", "kept", "rolled_back", "shadow")},
        "failed": told["failed"],
    }


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # the descriptor the folder was listed with
        return ""


# ------------------------------------------------------------------------ the faults


class Link:
    """Passes TCP on to the service; ``open`` cleared, nothing moves and nothing is closed: a network that is cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.open = threading.Event()
        self.open.set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.open.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self.open.wait()
        try:
            server = socket.create_connection(("127.0.0.1", self._port))
        except OSError:
            client.close()
            return
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.open.wait()
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def faults(server: Server, link: Link, draw: random.Random) -> dict[str, Callable[[], None]]:
    """What can go wrong, by name; each is over when it returns."""

    def process() -> int:
        assert server.process is not None
        return server.process.pid

    def last() -> None:
        time.sleep(draw.uniform(0.5, 4.0))

    def killed() -> None:
        server.kill()
        last()
        server.start()

    def stopped() -> None:
        server.signal(signal.SIGSTOP)
        last()
        server.signal(signal.SIGCONT)

    def cut_off() -> None:
        link.open.clear()
        last()
        link.open.set()

    def limited(what: int, most: int) -> None:
        before = resource.prlimit(process(), what)
        resource.prlimit(process(), what, (most, before[1]))
        last()
        resource.prlimit(process(), what, before)

    def out_of_memory() -> None:
        mapped = int(Path(f"/proc/{process()}/statm").read_text().split()[0]) * resource.getpagesize()
        limited(resource.RLIMIT_AS, mapped + MiB)

    def disk_full() -> None:
        limited(resource.RLIMIT_FSIZE, 0)  # no file grows: neither the log nor the archive

    return {one.__name__: one for one in (killed, stopped, cut_off, out_of_memory, disk_full)}


# --------------------------------------------------------------------------- the run


@dataclass
class Outcome:
    """What a run showed.

    Attributes:
        faults: How often each happened.
        trainings: What each training told.
        wrong: Everything that must not be; empty where all is well.
    """

    faults: Counter[str] = field(default_factory=Counter)
    trainings: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def run(seconds: float, seed: int, folder: Path) -> Outcome:
    """Trainings for so long, or until every fault has happened, and a look at what is left."""
    draw, found = random.Random(seed), Outcome()
    environment = {"NOWCAST_SESSION_EXPIRY": "5", "NOWCAST_ARCHIVE": str(folder / "archive.sqlite")}
    server = Server(folder, environment=environment).start()
    link = Link(server.port)
    certificate = certificate_in(folder)
    (folder / "nginx").mkdir()
    nginx = Nginx.start(folder / "nginx", certificate, link.port)
    running: list[subprocess.Popen[str]] = []
    try:
        for number in range(TRAININGS):
            url = nginx.url if number % 2 else f"http://127.0.0.1:{link.port}"
            mode = "on" if number < TRAININGS // 2 else "shadow"
            command = [sys.executable, "-m", "tests.e2e.chaos", "--training", url, "--mode", mode]
            running.append(
                subprocess.Popen(
                    [*command, "--seed", str(seed + number)],
                    cwd=Path(__file__).parents[2],
                    env={**os.environ, "NOWCAST_CA_FILE": str(certificate), "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=(folder / f"training{number}.log").open("w"),
                    text=True,
                )
            )
        for one in running:
            if one.stdout is not None:
                one.stdout.readline()  # it has begun, or ended
        kinds = faults(server, link, draw)
        end = time.monotonic() + seconds
        waiting: list[str] = []
        while time.monotonic() < end or len(found.faults) < len(kinds):
            waiting = waiting or draw.sample(sorted(kinds), len(kinds))  # all of them, in any order, again and again
            name = waiting.pop()
            kinds[name]()
            found.faults[name] += 1
            time.sleep(draw.uniform(0.5, 4.0))
        _collect(running, folder, found)
        _look_back(server, found)
    finally:
        for one in running:
            one.kill()
            one.wait(30)
        link.close()
        nginx.stop()
        server.stop()
    return found


def _collect(running: list[subprocess.Popen[str]], folder: Path, found: Outcome) -> None:
    """Tell all trainings to end, and hear what they tell; one that does not end is wrong."""
    for one in running:
        if one.stdin is not None:
            one.stdin.close()
            one.stdin = None
    for number, one in enumerate(running):
        log = folder / f"training{number}.log"
        try:
            told, _ = one.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            found.wrong.append(f"training {number} did not end: {log.read_text()[-2000:]}")
            continue
        if one.returncode or "Traceback" in log.read_text():
            found.wrong.append(f"training {number} ended with {one.returncode}: {log.read_text()[-2000:]}")
            continue
        became = json.loads(told)
        found.trainings.append(became)
        if became["left"]:
            found.wrong.append(f"training {number} left behind {became['left']}")
        if not became["patched"] and not became["as_alone"]:
            found.wrong.append(f"training {number} was never patched, and its losses are not those of a run alone")


def _look_back(server: Server, found: Outcome) -> None:
    """The service is there, and what the trainings had is gone."""
    import httpx

    end, held = time.monotonic() + 60, "nothing was answered"
    while time.monotonic() < end:
        try:
            lines = httpx.get(f"{server.url}/metrics", trust_env=False, timeout=10.0).text.splitlines()
        except httpx.HTTPError as exc:
            held = repr(exc)
        else:
            held = "; ".join(one for one in lines if one.startswith(("nowcast_held_bytes ", "nowcast_sessions ")))
            if held and all(one.endswith(" 0.0") for one in held.split("; ")):
                return
        time.sleep(0.5)
    found.wrong.append(f"left at the service: {held}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="how long the trainings run, at least")
    parser.add_argument("--seed", type=int, default=0, help="of faults, networks and batches")
    parser.add_argument("--training", help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="on", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.training:
        sys.stdout.write(json.dumps(training(given.training, given.seed, given.mode)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.seconds, given.seed, Path(folder))
    sys.stdout.write(json.dumps(vars(found), indent=2) + "\n")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
