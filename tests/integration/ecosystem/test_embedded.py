"""``url="embedded"``: a child process that serves this process alone, and never outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from nowcast_client import attach
from nowcast_client.errors import AttachError

from . import ranks

pytestmark = pytest.mark.socket

PARENT = """
import sys, time, torch
from nowcast_client import attach
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
handle = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "embedded", trial=False)
transport = handle._transport
while not transport._socket.exists():
    time.sleep(0.05)
print(transport.process.pid, transport._socket, flush=True)
time.sleep(600)
"""


def gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_training_without_a_service() -> None:
    model = ranks.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    data = ranks.batches(0)
    with attach(
        model, optimizer, "embedded", predictor="linear", trial=False, **{**ranks.SETTINGS, "wait": 120.0}
    ) as handle:
        for _ in range(41):
            ranks.step(model, optimizer, data, handle)
        child = handle._transport.process.pid
        summary = handle.summary()
    assert summary["patched"] == 2
    assert summary["bytes_sent"] > 0
    assert gone(child, 60.0)


@pytest.mark.kill
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_parent(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as parent:
        assert parent.stdout is not None
        child, path = parent.stdout.readline().split()
        assert psutil.pid_exists(int(child))
        parent.send_signal(number)
        parent.wait(30)
        assert gone(int(child), 60.0)
    assert not Path(path).exists()


def test_without_the_service_extra_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util as util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    model = ranks.network()
    with pytest.raises(AttachError, match=r"'uvicorn' is not installed.*nowcast-sidecar\[service\]"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "embedded")


def test_a_child_that_cannot_start_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words reach the log; the training goes on without it."""
    monkeypatch.setenv("NOWCAST_DEVICE", "no-such-device")
    model = ranks.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    failures: list[str] = []
    data = ranks.batches(0)
    with attach(
        model,
        optimizer,
        "embedded",
        trial=False,
        on_event=lambda event: failures.append(str(event.detail.get("message"))) if event.kind == "failed" else None,
        **{**ranks.SETTINGS, "wait": 60.0},
        nowcast_timeout=60.0,
    ) as handle:
        for _ in range(4):
            ranks.step(model, optimizer, data, handle)
        assert handle.wait(60.0)
        ranks.step(model, optimizer, data, handle)
    assert failures
    assert "ended with status" in failures[0]
