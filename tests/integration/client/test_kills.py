"""The server dies or hangs under a running training: real process, real signals, real sockets."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from .harness import Job, Proxy, Server

pytestmark = [pytest.mark.socket, pytest.mark.kill]


def during_upload(direction: str, data: bytes) -> bool:
    """The third snapshot is on its way; its last bytes have not been passed on."""
    return direction == "up" and b"/snapshots/30 " in data


def during_nowcast(direction: str, data: bytes) -> bool:
    """The question has been answered with 202, the nowcast is under way."""
    return direction == "up" and b"GET " in data and b"/nowcasts/" in data


@pytest.mark.parametrize("moment", [during_upload, during_nowcast])
@pytest.mark.parametrize("comes_back", [True, False])
def test_killed_server(
    victim: Server,
    clean: torch.Tensor,
    alone: torch.Tensor,
    moment: Callable[[str, bytes], bool],
    comes_back: bool,
) -> None:
    killed = threading.Event()

    def watch(direction: str, data: bytes) -> None:
        if not killed.is_set() and moment(direction, data):
            killed.set()
            victim.kill()
            if comes_back:
                threading.Timer(0.2, victim.start).start()

    proxy = Proxy(victim.port, watch)
    job = Job(proxy.url, wait=60.0, nowcast_timeout=60.0 if comes_back else 10.0)
    job.run(70)
    assert killed.is_set()
    if comes_back:
        # Patched at the same step with the same change as if nothing had happened.
        assert torch.equal(job.weights(), clean)
        assert job.handle.summary()["resent"] >= 2
    else:
        assert torch.equal(job.weights(), alone)
        assert job.handle.summary()["patched"] == 0
        assert job.handle.summary()["failed"]
    close_quickly(job)
    proxy.close()


def close_quickly(job: Job) -> None:
    """It gives up what is under way after two seconds; what it gives up may take twenty."""
    start = time.monotonic()
    job.handle.close()
    assert time.monotonic() - start < 10.0


def test_killed_between_snapshots(victim: Server, clean: torch.Tensor) -> None:
    job = Job(victim.url, wait=60.0)
    job.run(35)
    assert job.handle.wait(60)
    victim.kill()
    victim.start()
    job.run(35)
    assert torch.equal(job.weights(), clean)
    assert job.handle.summary()["resent"] == 3
    job.handle.close()


def test_killed_between_nowcasts_and_never_back(victim: Server) -> None:
    job = Job(victim.url, nowcast_timeout=10.0)
    job.run(55)
    assert job.count("patched") == 1
    victim.kill()
    job.run(100)
    assert job.count("patched") == 1
    assert bool(torch.isfinite(job.weights()).all())
    job.handle.close()


def test_hanging_server_costs_no_more_than_the_deadline(victim: Server) -> None:
    """A hook that waited for the server would wait twenty seconds."""
    job = Job(victim.url, timeout=20.0, nowcast_timeout=20.0)
    job.run(55)
    assert job.count("patched") == 1
    job.handle.wait(60)
    job.slowest, work = 0.0, job.handle._nowcasting
    work.cadence = replace(work.cadence, wait=0.3)
    victim.signal(signal.SIGSTOP)
    job.run(100)
    assert job.slowest < 5.0, "the hook waited longer than it may"
    assert job.count("patched") == 1
    victim.signal(signal.SIGCONT)
    work.cadence = replace(work.cadence, wait=30.0)
    assert job.handle.wait(60)
    job.run(120)
    assert job.count("patched") >= 2, job.handle.summary()
    job.handle.close()


def test_hanging_server_without_waiting(victim: Server, alone: torch.Tensor) -> None:
    victim.signal(signal.SIGSTOP)
    job = Job(victim.url, wait=0.0, timeout=20.0, nowcast_timeout=20.0)
    job.run(70)
    assert job.slowest < 5.0
    assert torch.equal(job.weights(), alone)
    close_quickly(job)
