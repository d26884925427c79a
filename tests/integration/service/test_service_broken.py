"""Connections that break and bytes that lie: nothing half-received ever counts, and nothing makes the service fail."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
from collections.abc import Iterator

import httpx
import msgpack
import numpy as np
import pytest
from nowcast_proto.stream import Encoder
from nowcast_proto.version import MEDIA_TYPE

from .service_harness import (
    STREAM_HEADERS,
    Server,
    Training,
    ask,
    body,
    create,
    error,
    eventually,
    fetch,
    send,
    sequential,
    tensors,
)

pytestmark = pytest.mark.socket

SPEC = sequential(8, 16, 4)
TRAINING = Training(SPEC)


def raw_request(path: str, data: bytes, method: str = "PUT", headers: str = "") -> tuple[bytes, int]:
    """A whole HTTP request as bytes, and where its body begins."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: nowcast\r\nContent-Type: {MEDIA_TYPE}\r\n"
        f"Content-Length: {len(data)}\r\n{headers}\r\n"
    ).encode()
    return head + data, len(head)


def cut_off(server: Server, data: bytes, *, reset: bool) -> None:
    """Send these bytes and break the connection, politely or with a reset."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(data)


def test_an_upload_cut_at_every_header_byte_and_many_payload_bytes(server: Server):
    """Cut at every byte of the HTTP head and the stream header, and at 200 places of the payload: never a snapshot,
    and the retry succeeds."""
    stream = body(TRAINING.snapshot(0))
    (header_bytes,) = struct.unpack_from("<I", stream)
    request, head = raw_request("/v1/sessions/cut/snapshots/0", stream)
    payload = range(head + 4 + header_bytes, len(request))
    cuts = [*range(1, head + 4 + header_bytes), *random.Random(0).sample(payload, 200)]
    with server.client() as client:
        create(client, "cut", SPEC)
        for number, cut in enumerate(cuts):
            cut_off(server, request[:cut], reset=number % 2 == 0)
            if number % 25 == 0:
                state = client.get("/v1/sessions/cut/snapshots/0").json()
                assert state["state"] in ("missing", "partial")
        assert client.get("/v1/sessions/cut/snapshots/0").json()["state"] != "complete"
        error(ask(client, "cut", "n1", (0, 100)), 409, "missing_snapshots")
        # 201, not 200: none of them ever counted.
        assert sent(client, "/v1/sessions/cut/snapshots/0", TRAINING.snapshot(0)).status_code == 201
        found = client.get("/metrics").text
        assert 'nowcast_failures_total{reason="internal"}' not in found


def sent(client: httpx.Client, path: str, encoder: Encoder) -> httpx.Response:
    """Send a snapshot, again while the service is still busy with a request that broke off."""
    answers: list[httpx.Response] = []

    def taken() -> bool:
        answers.append(send(client, "PUT", path, encoder))
        return answers[-1].status_code not in (409, 429)

    assert eventually(taken), answers[-1].text
    return answers[-1]


def requests(client: httpx.Client, status: int) -> float:
    """Requests that ended with this status so far."""
    lines = client.get("/metrics").text.splitlines()
    mine = [line for line in lines if line.startswith("nowcast_requests_total") and f'status="{status}"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in mine)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with little room and little patience."""
    settings = {"BUDGET": 2**30, "MAX_QUEUE": 1, "MAX_UPLOADS": 1, "MAX_JSON": 10_000, "UPLOAD_IDLE": 2}
    environment = {f"NOWCAST_{name}": str(value) for name, value in settings.items()}
    running = Server(tmp_path_factory.mktemp("small"), environment).start()
    yield running
    running.stop()


def test_a_one_shot_cut_anywhere_frees_its_place(small: Server):
    request, head = raw_request("/nowcast", body(TRAINING.request()), method="POST")
    cuts = [head, head + 3, head + 40, *random.Random(1).sample(range(head, len(request)), 60)]
    answers: list[httpx.Response] = []

    def served() -> bool:
        answers.append(send(client, "POST", "/nowcast", TRAINING.request()))
        return answers[-1].status_code != 429

    with small.client() as client:
        for cut in cuts:
            cut_off(small, request[:cut], reset=True)
            # The only place is free again as soon as the service has noticed.
            assert eventually(served)
            tensors(answers[-1])
        assert eventually(lambda: "nowcast_held_bytes 0.0" in client.get("/metrics").text)


def test_a_broken_upload_resumes_where_it_stands(server: Server):
    training = Training(sequential(64, 256, 64))
    encoder = training.snapshot(0)
    stream = body(encoder)
    request, head = raw_request("/v1/sessions/resume/snapshots/0", stream)
    digest = encoder.header.content_digest()
    with server.client() as client:
        create(client, "resume", training.spec)
        gone = requests(client, 499)
        cut_off(server, request[: head + len(stream) // 2], reset=False)
        assert eventually(lambda: requests(client, 499) > gone)
        at = client.get("/v1/sessions/resume/snapshots/0").json()["received"]
        assert 0 < at <= len(stream) // 2
        state = client.get("/v1/sessions/resume/snapshots/0").json()
        assert (state["state"], state["total"], state["digest"]) == ("partial", len(stream), digest)
        path = "/v1/sessions/resume/snapshots/0"

        def rest(start: int, **headers: str):
            return client.put(path, content=encoder.chunks(start=start), headers={**STREAM_HEADERS, **headers})

        for wrong in (at - 1, at + 1):
            found = error(rest(wrong, **{"Nowcast-Offset": str(wrong)}), 409, "conflict")
            assert found["detail"]["offset"] == at
        other = {"Nowcast-Offset": str(at), "Nowcast-Digest": "0" * 32}
        assert error(rest(at, **other), 409, "conflict")["detail"]["offset"] == 0
        assert rest(at, **{"Nowcast-Offset": str(at), "Nowcast-Digest": digest}).status_code == 201
        send(client, "PUT", "/v1/sessions/resume/snapshots/100", training.snapshot(100))
        ask(client, "resume", "n1", (0, 100), predictor="lawa")
        _, found = tensors(fetch(client, "resume", "n1"))
    for name, value in training.at(0).items():
        assert np.allclose(found[name], (value + training.at(100)[name]) / 2, atol=1e-6)


def test_every_corrupted_byte_of_an_upload_is_noticed(server: Server):
    stream = bytearray(body(TRAINING.snapshot(0)))
    rng = random.Random(2)
    with server.client() as client:
        create(client, "flip", SPEC)
        for _ in range(150):
            at = rng.randrange(len(stream))
            stream[at] ^= 1 << rng.randrange(8)
            response = client.put("/v1/sessions/flip/snapshots/0", content=bytes(stream), headers=STREAM_HEADERS)
            assert 400 <= response.status_code < 500, (at, response.text)
            assert client.get("/v1/sessions/flip/snapshots/0").json()["state"] != "complete"
            stream = bytearray(body(TRAINING.snapshot(0)))
        assert send(client, "PUT", "/v1/sessions/flip/snapshots/0", TRAINING.snapshot(0)).status_code == 201


def malformed(rng: random.Random, good: bytes) -> bytes:
    """A body that is wrong in one of many ways."""
    kind = rng.randrange(8)
    data = bytearray(good)
    if kind == 0:
        return rng.randbytes(rng.randrange(2000))
    if kind == 1:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 2:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 3:
        at = rng.randrange(len(data))
        return bytes(data[:at] + rng.randbytes(rng.randrange(50)) + data[at:])
    if kind == 4:
        return struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1, rng.randrange(2**32)])) + bytes(data[4:])
    fields = msgpack.unpackb(good[4 : 4 + struct.unpack_from("<I", good)[0]])
    junk = [None, -1, 2**63, 1e308, "", "x" * 3000, b"\0" * 16, [], {}, [[]] * 50, True, float("nan")]
    target = rng.choice([fields, fields["message"], *fields["tensors"]])
    key = rng.choice([*target, "new"])
    if kind == 5:
        target.pop(key, None)
    else:
        target[key] = rng.choice(junk)
    if kind == 7 and isinstance(fields["tensors"], list):
        fields["tensors"] = fields["tensors"] * rng.randrange(5)
    packed = msgpack.packb(fields)
    return struct.pack("<I", len(packed)) + packed + bytes(data[-200:])


def test_malformed_bodies_never_break_the_service(server: Server):
    rng = random.Random(3)
    snapshot, request = body(TRAINING.snapshot(0)), body(TRAINING.request())
    routes = [("POST", "/nowcast", request), ("PUT", "/v1/sessions/bad/snapshots/0", snapshot)]
    codes = set()

    def send_malformed(count: int) -> None:
        for number in range(count):
            method, path, good = routes[number % 2]
            response = client.request(method, path, content=malformed(rng, good), headers=STREAM_HEADERS)
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                codes.add(response.json()["code"])

    with server.client() as client:
        create(client, "bad", SPEC)
        tensors(send(client, "POST", "/nowcast", TRAINING.request()))
        send_malformed(500)
        warm = server.settled()
        send_malformed(2500)
        assert {"malformed_frame", "too_large", "checksum_mismatch", "unsupported_version", "invalid_request"} <= codes
        # Of 2,500 bodies of some 3 KB not even one in two may stay.
        assert eventually(lambda: server.rss() - warm < 4 * 2**20), f"{(server.rss() - warm) / 2**20:.1f} MiB"
        assert eventually(lambda: client.get("/readyz").status_code == 200)


def test_a_claimed_size_takes_no_memory(small: Server):
    """A header may promise what it likes: nothing is allocated beyond the budget, nothing touched before it comes."""
    spec = sequential(8192, 8192)
    claim = Training(sequential(8, 8)).request(steps=(0,)).header
    rows = [
        {"name": p.name, "dtype": "float32", "shape": list(p.shape), "digest": bytes(16), "snapshot": i}
        for i in range(3)
        for p in spec.parameters
    ]
    message = {"spec": spec.model_dump(mode="json", exclude_none=True), "k": 1, "predictor": "linear"}

    def promised(snapshots: int) -> httpx.Response:
        fields = {"version": 1, "kind": claim.kind, "message": message, "tensors": rows[: 2 * snapshots]}
        packed = msgpack.packb(fields)
        return client.post("/nowcast", content=struct.pack("<I", len(packed)) + packed, headers=STREAM_HEADERS)

    with small.client() as client:
        error(promised(2), 400, "malformed_frame")
        before = small.rss()
        small.reset_peak()
        error(promised(3), 413, "too_large")
        for _ in range(5):
            error(promised(2), 400, "malformed_frame")
        # One such tensor has 256 MiB.
        assert small.peak() - before < 32 * 2**20
        assert eventually(lambda: "nowcast_held_bytes 0.0" in client.get("/metrics").text)


def test_a_silent_client_is_given_up(small: Server):
    request, head = raw_request("/nowcast", body(TRAINING.request()), method="POST")
    at = head + 100
    with socket.create_connection(("127.0.0.1", small.port)) as connection, small.client() as client:
        connection.settimeout(30)
        connection.sendall(request[:at])

        def refused() -> bool:
            nonlocal at
            connection.sendall(request[at : at + 1])  # it is slow, not silent, until it was seen to be in the way
            at += 1
            return send(client, "POST", "/nowcast", TRAINING.request()).status_code == 429

        assert eventually(refused)
        assert b"504" in connection.recv(65536).split(b"\r\n")[0]
        assert eventually(lambda: send(client, "POST", "/nowcast", TRAINING.request()).status_code == 200)


def test_a_slow_one_shot_gives_its_place_back_at_its_deadline(small: Server):
    """However slowly a body trickles in, it holds the only place no longer than it says it is of use."""
    request, _ = raw_request("/nowcast", body(TRAINING.request(deadline=1.0)), method="POST")
    with socket.create_connection(("127.0.0.1", small.port)) as connection, small.client() as client:
        connection.settimeout(0.1)
        connection.sendall(request[:-1000])
        answer = b""
        for at in range(len(request) - 1000, len(request) - 1):
            connection.sendall(request[at : at + 1])
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(65536)
                break
        connection.settimeout(30)  # the body may come in a packet of its own
        while b"}" not in answer and (part := connection.recv(65536)):
            answer += part
        assert b"504" in answer.split(b"\r\n")[0]
        assert b"deadline_exceeded" in answer
        assert eventually(lambda: send(client, "POST", "/nowcast", TRAINING.request()).status_code == 200)


def test_an_endless_head_is_cut_off(small: Server):
    """It comes before any key: neither its length nor its slowness may cost much."""
    before = small.settled()
    small.reset_peak()
    sent = 0
    with socket.create_connection(("127.0.0.1", small.port)) as connection:
        connection.settimeout(30)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"x" * 2**16)
                sent += 2**16
    assert sent < 2**24, "64 MB of one header were taken"
    assert small.peak() - before < 2**24
    idle = http.client.HTTPConnection("127.0.0.1", small.port, timeout=30)
    idle.request("GET", "/healthz")
    assert idle.getresponse().read()
    for begun in (b"", b"GET /healthz HTTP/1.1\r\n"):
        with socket.create_connection(("127.0.0.1", small.port)) as connection:
            connection.settimeout(30)
            connection.sendall(begun)
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""
    # One that is only idle between two requests is left alone.
    idle.request("GET", "/healthz")
    assert idle.getresponse().status == 200
    idle.close()


def test_json_bodies_are_capped_and_checked(small: Server):
    with small.client() as client:
        error(client.put("/v1/sessions/s", content=b" " * 10_001), 413, "too_large")
        for bad in (b"", b"{", b"[]", b'{"spec": 1}', b'{"spec": {}}', b"\xff", b"[" * 5000, b'{"keep": 1e999}'):
            response = client.put("/v1/sessions/s", content=bad)
            assert response.status_code == 422, response.text
            assert response.json()["code"] in ("invalid_request", "invalid_spec")
