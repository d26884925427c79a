"""Several keys, one of them greedy: the others are served, and what holds up everybody ends."""

from __future__ import annotations

import contextlib
import socket

import pytest
from nowcast_service.runtime.keys import hash_key, new_key

from .service_harness import Serve, Server, Training, ask, body, create, error, eventually, fetch, send, sequential

pytestmark = pytest.mark.socket

SPEC = sequential(8, 16, 4)
TRAINING = Training(SPEC)
ALICE, BOB = new_key(), new_key()


@pytest.fixture
def two(serve: Serve) -> Server:
    return serve(
        api_key_hashes=f"alice:{hash_key(ALICE)},bob:{hash_key(BOB)}", max_uploads=4, max_queue=8, upload_idle=5
    )


def trickle(server: Server, key: str, request: bytes, sent: int) -> socket.socket:
    """A connection that has sent the beginning of a one-shot request."""
    link = socket.create_connection(("127.0.0.1", server.port), 30)
    head = (
        f"POST /nowcast HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/vnd.nowcast.v1\r\nContent-Length: {len(request)}\r\n\r\n"
    )
    link.sendall(head.encode() + request[:sent])
    return link


def test_a_tenant_that_takes_all_it_can_get_leaves_others_theirs_and_a_trickle_ends(two: Server):
    request = body(TRAINING.request(deadline=86_400.0))
    links = [trickle(two, ALICE, request, 400) for _ in range(8)]
    try:
        with two.client(BOB) as client:
            assert send(client, "POST", "/nowcast", TRAINING.request()).status_code == 200
        with two.client(ALICE) as client:
            error(send(client, "POST", "/nowcast", TRAINING.request()), 429, "busy")

        def gone() -> bool:
            for link in links:
                with contextlib.suppress(OSError):  # ended
                    link.sendall(b"x")
            with two.client(ALICE) as client:
                return send(client, "POST", "/nowcast", TRAINING.request()).status_code == 200

        assert eventually(gone, 120)  # her own places are free again
    finally:
        for link in links:
            link.close()


def test_a_spec_that_takes_too_long_is_refused_where_it_is_needed(serve: Serve):
    """Positions of 300,000 neurons in a twentieth of a second."""
    server = serve(spec_seconds=0.05)
    wide = sequential(300_000, 1)
    training = Training(wide)
    with server.client() as client:
        found = send(client, "POST", "/nowcast", training.request(predictor="nino", k=1))
        assert "takes more than" in error(found, 413, "too_large")["message"]
        assert send(client, "POST", "/nowcast", TRAINING.request()).status_code == 200


def test_a_deadline_ends_what_is_being_computed(serve: Serve):
    server = serve()
    spec = sequential(*[512] * 9)
    training = Training(spec)
    steps = (0, 100, 200, 300, 400)
    with server.client() as client:
        create(client, "late", spec)
        for step in steps:
            assert send(client, "PUT", f"/v1/sessions/late/snapshots/{step}", training.snapshot(step)).is_success
        assert ask(client, "late", "warm", steps, predictor="nino", deadline=600).status_code == 202
        assert fetch(client, "late", "warm", 600).status_code == 200
        seconds = next(
            float(line.split()[-1])
            for line in client.get("/metrics").text.splitlines()
            if line.startswith('nowcast_stage_seconds_sum{stage="compute"}')
        )
        assert ask(client, "late", "n1", steps, predictor="nino", deadline=seconds / 4).status_code == 202
        error(fetch(client, "late", "n1"), 504, "deadline_exceeded")
        assert eventually(lambda: "nowcast_running 0.0" in client.get("/metrics").text)
        ended = next(
            float(line.split()[-1])
            for line in client.get("/metrics").text.splitlines()
            if line.startswith('nowcast_nowcasts_total{predictor="nino",result="failed"}')
        )
        assert ended == 1
