"""SIGTERM, SIGSTOP and SIGKILL, sent for real to a service at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from nowcast_proto.stream import Encoder
from nowcast_service.nino.checkpoint import Checkpoint, save_checkpoint
from nowcast_service.nino.config import NiNoConfig
from nowcast_service.nino.model import NiNoTwin

from ...ports import free_port
from .service_harness import Serve, Server, Training, ask, create, error, eventually, fetch, send, sequential, tensors

pytestmark = [pytest.mark.socket, pytest.mark.kill]

STEPS = (0, 100, 200, 300, 400)
SPEC = sequential(8, 16, 4)
TRAINING = Training(SPEC)
SLOW = Training(sequential(300, 600, 600, 300))
"""Small on the line, and seconds of work for the exact engine: time enough to see whatever happens meanwhile."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A graph network with random weights."""
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"), layers=12)


def random_checkpoint(folder: Path, layers: int, hidden: int = 32) -> Path:
    """A graph network with random weights; its size says how long it works."""
    import torch

    torch.manual_seed(0)
    config = NiNoConfig(hidden=hidden, layers=layers)
    path = folder / "random.safetensors"
    save_checkpoint(path, Checkpoint.of(config, NiNoTwin(config).state_dict()))
    return path


def busy(server: Server, jobs: int) -> None:
    """Wait until that many nowcasts are admitted."""

    def admitted() -> bool:
        values = dict(
            line.split()
            for line in client.get("/metrics").text.splitlines()
            if line.startswith("nowcast_") and line.count(" ") == 1
        )
        return float(values["nowcast_queue_depth"]) + float(values["nowcast_running"]) >= jobs

    with server.client() as client:
        assert eventually(admitted, 60), f"never saw {jobs} nowcasts under way"


def test_sigterm_answers_the_six_in_flight_and_refuses_the_rest(serve: Serve, checkpoint):
    """One that is long at work and five short ones that wait for it."""
    grace = 200
    server = serve(checkpoint=checkpoint, shutdown_grace=grace)
    first_in_line = SLOW.request(predictor="nino", steps=STEPS, k=5)
    request = TRAINING.request(predictor="nino", steps=STEPS, k=5)

    def one_shot(encoder: Encoder) -> httpx.Response:
        with server.client(timeout=grace) as client:
            return send(client, "POST", "/nowcast", encoder)

    with server.client(timeout=grace) as client, ThreadPoolExecutor(8) as pool:
        create(client, "s", SPEC)
        for step in STEPS:
            assert send(client, "PUT", f"/v1/sessions/s/snapshots/{step}", TRAINING.snapshot(step)).status_code == 201
        long = pool.submit(one_shot, first_in_line)
        busy(server, 1)
        answers = [pool.submit(one_shot, request) for _ in range(3)]
        for name in ("n1", "n2"):
            assert ask(client, "s", name, STEPS, predictor="nino", k=5).status_code == 202
        busy(server, 6)
        server.signal(signal.SIGTERM)
        stopped = time.monotonic()
        assert eventually(lambda: client.get("/readyz").status_code == 503)
        refused = ask(client, "s", "n3", STEPS, predictor="nino", k=6)
        error(refused, 503, "unavailable")
        assert int(refused.headers["Retry-After"]) >= 1
        error(send(client, "POST", "/nowcast", TRAINING.request()), 503, "unavailable")
        error(create(client, "late", SPEC), 503, "unavailable")
        error(send(client, "PUT", "/v1/sessions/s/snapshots/500", TRAINING.snapshot(500)), 503, "unavailable")
        assert client.get("/healthz").status_code == 200
        _, first = tensors(fetch(client, "s", "n1", grace))
        _, second = tensors(fetch(client, "s", "n2", grace))
        for name in first:
            assert np.array_equal(first[name], second[name])
        for answer in answers:
            _, found = tensors(answer.result())
            assert all(np.allclose(found[name], first[name], rtol=0, atol=1e-6) for name in first)
        _, found = tensors(long.result())
        assert set(found) == set(SLOW.spec.shapes())
    assert server.process.wait(grace) == 0
    assert time.monotonic() - stopped < grace


def test_sigterm_ends_in_time_even_when_a_nowcast_does_not(serve: Serve, tmp_path):
    """A nowcast that would take minutes; two seconds of grace, and as much again many times over for a slow machine."""
    server = serve(checkpoint=random_checkpoint(tmp_path, layers=64, hidden=128), shutdown_grace=2)
    with server.client(timeout=120) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(send, client, "POST", "/nowcast", SLOW.request(predictor="nino", steps=STEPS, k=5))
        busy(server, 1)
        server.signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        error(answer.result(), 503, "unavailable")


def test_a_stopped_process_is_not_ready_and_recovers(server: Server):
    with server.client() as client:
        assert eventually(lambda: client.get("/readyz").status_code == 200)
    with server.client(timeout=1.0) as client:
        server.signal(signal.SIGSTOP)
        try:
            for path in ("/readyz", "/healthz"):
                with pytest.raises(httpx.TimeoutException):
                    client.get(path)
        finally:
            server.signal(signal.SIGCONT)
    with server.client() as client:
        assert eventually(lambda: client.get("/readyz").status_code == 200)
        tensors(send(client, "POST", "/nowcast", TRAINING.request()))


def test_a_stuck_queue_is_not_ready_but_alive(serve: Serve, checkpoint):
    """Readiness looks through the queue: a nowcast over its time makes it false, while the process lives."""
    server = serve(checkpoint=checkpoint, stall_after=0.2)
    with server.client(timeout=120) as client, ThreadPoolExecutor(1) as pool, server.client() as watcher:
        assert eventually(lambda: watcher.get("/readyz").status_code == 200)
        answer = pool.submit(send, client, "POST", "/nowcast", SLOW.request(predictor="nino", steps=STEPS, k=5))
        assert eventually(lambda: watcher.get("/readyz").status_code == 503)
        assert watcher.get("/healthz").status_code == 200
        tensors(answer.result())
        assert eventually(lambda: watcher.get("/readyz").status_code == 200)
        assert "nowcast_ready 1.0" in watcher.get("/metrics").text


def test_after_kill_9_the_history_is_asked_for_again(serve: Serve):
    server = serve(port=free_port())
    with server.client() as client:
        create(client, "s", SPEC)
        for step in STEPS:
            send(client, "PUT", f"/v1/sessions/s/snapshots/{step}", TRAINING.snapshot(step))
        ask(client, "s", "n1", STEPS)
        _, before = tensors(fetch(client, "s", "n1"))
    server.signal(signal.SIGKILL)
    server.process.wait(30)
    server.start()
    with server.client() as client:
        error(ask(client, "s", "n1", STEPS), 404, "not_found")
        assert create(client, "s", SPEC).status_code == 201
        found = error(ask(client, "s", "n1", STEPS), 409, "missing_snapshots")
        for step in found["detail"]["missing"]:
            send(client, "PUT", f"/v1/sessions/s/snapshots/{step}", TRAINING.snapshot(step))
        assert ask(client, "s", "n1", STEPS).status_code == 202
        _, after = tensors(fetch(client, "s", "n1"))
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_an_abandoned_unix_socket_is_taken_over(serve: Serve, tmp_path):
    path = tmp_path / "s.sock"
    first = serve(unix_socket=path)
    with pytest.raises(RuntimeError, match="another service listens"):
        serve(unix_socket=path)
    first.signal(signal.SIGKILL)
    first.process.wait(30)
    assert path.exists()
    second = serve(unix_socket=path)
    with second.client() as client:
        assert client.get("/healthz").status_code == 200
    second.signal(signal.SIGTERM)
    assert second.process.wait(30) == 0
    assert not path.exists()


def test_it_does_not_outlive_its_parent(serve: Serve, tmp_path):
    """A parent that is killed closes its end of the pipe, and the service is gone; so is its socket."""
    path = tmp_path / "s.sock"
    parent = (
        "import os, subprocess, sys, time\n"
        "end, mine = os.pipe()\n"
        "os.set_inheritable(end, True)\n"
        "child = subprocess.Popen([sys.executable, '-m', 'nowcast_service.cli', 'serve', '--predictor', 'linear',\n"
        "    '--unix-socket', sys.argv[1], '--parent-fd', str(end)], close_fds=True, pass_fds=[end])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent, path], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            assert eventually(path.exists, 60)
            process.kill()
            assert eventually(lambda: not path.exists())
            assert eventually(lambda: not alive(child))
        finally:
            process.kill()
            if alive(child):
                os.kill(child, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs, zombies not counted."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
