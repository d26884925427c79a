"""Large bodies: what one caller sends to be parsed holds up nobody else, and its errors are few."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest
from nowcast_proto.stream import Encoder

from .service_harness import STREAM_HEADERS, Server, Training, error, sequential

pytestmark = pytest.mark.socket

WRONG: dict[str, Any] = {
    "parameters": {"spec": {"family": "own", "parameters": [{"nmae": "x", "shpe": "y"}] * 180_000}},
    "too many parameters": {
        "spec": {"family": "own", "parameters": [{"name": f"{i}.w", "shape": [3, 3]} for i in range(130_000)]}
    },
    "ranges": {"spec": {"graph": {"ranges": [{"x": 1}] * 90_000}, "parameters": [{"name": "a", "shape": [1]}]}},
    "unknown fields": {"spec": {f"f{i}": 0 for i in range(300_000)}},
    "a list of lists": {"spec": [[]] * 500_000},
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_large_body_full_of_errors_is_refused_briefly(server: Server, kind: str):
    body = json.dumps(WRONG[kind]).encode()
    waits: list[float] = []
    begun, over = threading.Event(), threading.Event()

    def watch() -> None:
        with server.client() as client:
            while not over.is_set():
                began = time.monotonic()
                assert client.get("/healthz").status_code == 200
                waits.append(time.monotonic() - began)
                begun.set()

    watcher = threading.Thread(target=watch)
    with server.client() as client:
        watcher.start()
        assert begun.wait(60)
        answer = client.put("/v1/sessions/big", content=body)
        over.set()
        watcher.join()
        assert answer.status_code in (413, 422)
        assert answer.json()["code"] in ("invalid_spec", "invalid_request", "too_large")
        assert len(answer.content) < 10_000
        assert "nowcast_held_bytes 0.0" in client.get("/metrics").text


def test_what_parsing_takes_is_within_the_budget(tmp_path):
    server = Server(tmp_path, {"NOWCAST_BUDGET": "1MiB"}).start()
    try:
        with server.client() as client:
            error(client.put("/v1/sessions/s", content=b" " * 100_000 + b"{}"), 413, "too_large")
    finally:
        server.stop()


def test_what_a_one_shot_call_cannot_have_is_said_before_its_snapshots_come(server: Server):
    """Only the head is sent, and the answer comes: horizon, number of snapshots, tensors."""
    training = Training(sequential(8, 16, 4))
    far = training.request(predictor="nino", checkpoint="nowcast-h64", k=9_999)
    for request in (far, training.request(steps=(0,))):
        whole = b"".join(bytes(chunk) for chunk in request.chunks())
        head = whole[: 4 + int.from_bytes(whole[:4], "little")]
        with socket.create_connection(("127.0.0.1", server.port), 60) as link:
            link.sendall(
                b"POST /v1/nowcast HTTP/1.1\r\nHost: x\r\nContent-Type: application/vnd.nowcast.v1\r\n"
                + b"Content-Length: %d\r\n\r\n" % len(whole)
                + head
            )
            assert link.recv(64).startswith(b"HTTP/1.1 422")


def test_a_long_head_of_a_stream_is_read_piece_by_piece(server: Server):
    """Forty thousand tensors, of which the last is wrong: the first wrong one is named."""
    parameters = [{"name": f"layers.{n}.weight", "shape": [1]} for n in range(40_000)]
    parameters[-1]["shape"] = [0]
    message = {"spec": {"family": "own", "parameters": parameters}, "k": 1, "predictor": "linear"}
    body = b"".join(bytes(chunk) for chunk in Encoder("nowcast.request", message, []).chunks())
    with server.client() as client:
        answer = client.post("/v1/nowcast", content=body, headers=STREAM_HEADERS)
        assert "parameters.39999.shape" in error(answer, 422, "invalid_spec")["message"]
        assert "nowcast_held_bytes 0.0" in client.get("/metrics").text
