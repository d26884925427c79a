"""Large bodies: what one caller sends to be parsed holds up nobody else, and its errors are few."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from .service_harness import Server, error

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
    over = threading.Event()

    def watch() -> None:
        with server.client() as client:
            while not over.is_set():
                began = time.monotonic()
                assert client.get("/healthz").status_code == 200
                waits.append(time.monotonic() - began)

    watcher = threading.Thread(target=watch)
    with server.client() as client:
        watcher.start()
        answer = client.put("/v1/sessions/big", content=body)
        over.set()
        watcher.join()
        assert answer.status_code in (413, 422)
        assert answer.json()["code"] in ("invalid_spec", "invalid_request", "too_large")
        assert len(answer.content) < 10_000
        assert waits
        assert "nowcast_held_bytes 0.0" in client.get("/metrics").text


def test_what_parsing_takes_is_within_the_budget(tmp_path):
    server = Server(tmp_path, {"NOWCAST_BUDGET": "1MiB"}).start()
    try:
        with server.client() as client:
            error(client.put("/v1/sessions/s", content=b" " * 100_000 + b"{}"), 413, "too_large")
    finally:
        server.stop()
