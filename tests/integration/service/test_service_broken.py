"""Connections that break and bytes that lie: nothing half-received ever counts, and nothing makes the service fail."""

from __future__ import annotations

import random
import socket
import struct
import time

import msgpack
import numpy as np
import pytest
from nowcast_proto.version import MEDIA_TYPE

from .service_harness import (
    STREAM_HEADERS,
    Serve,
    Server,
    Training,
    ask,
    body,
    create,
    error,
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
        eventually_free(client, "cut")
        assert client.get("/v1/sessions/cut/snapshots/0").json()["state"] != "complete"
        error(ask(client, "cut", "n1", (0,)), 409, "missing_snapshots")
        assert send(client, "PUT", "/v1/sessions/cut/snapshots/0", TRAINING.snapshot(0)).status_code == 201
        found = client.get("/metrics").text
        assert 'nowcast_failures_total{reason="internal"}' not in found


def eventually_free(client, session: str) -> int:
    """Wait until no request is sending any more; the byte a resumed upload goes on from."""
    deadline = time.monotonic() + 10
    seen: list[int] = []
    while time.monotonic() < deadline:
        state = client.get(f"/v1/sessions/{session}/snapshots/0").json()
        seen.append(state["received"])
        if len(seen) > 3 and len(set(seen[-3:])) == 1:
            return seen[-1]
        time.sleep(0.05)
    raise AssertionError("the upload never settled")


def test_a_one_shot_cut_anywhere_frees_its_place(serve: Serve):
    server = serve(max_queue=1, max_uploads=1)
    request, head = raw_request("/nowcast", body(TRAINING.request()), method="POST")
    cuts = [head, head + 3, head + 40, *random.Random(1).sample(range(head, len(request)), 60)]
    with server.client() as client:
        held = client.get("/metrics").text
        for cut in cuts:
            cut_off(server, request[:cut], reset=True)
            for _ in range(200):  # the only place is free again as soon as the service has noticed
                response = send(client, "POST", "/nowcast", TRAINING.request())
                if response.status_code != 429:
                    break
                time.sleep(0.01)
            tensors(response)
        assert "nowcast_held_bytes 0.0" in held
        assert "nowcast_held_bytes 0.0" in client.get("/metrics").text


def test_a_broken_upload_resumes_where_it_stands(server: Server):
    training = Training(sequential(64, 256, 64))
    encoder = training.snapshot(0)
    stream = body(encoder)
    request, head = raw_request("/v1/sessions/resume/snapshots/0", stream)
    digest = encoder.header.content_digest()
    with server.client() as client:
        create(client, "resume", training.spec)
        cut_off(server, request[: head + len(stream) // 2], reset=False)
        at = eventually_free(client, "resume")
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
    with server.client() as client:
        create(client, "bad", SPEC)
        tensors(send(client, "POST", "/nowcast", TRAINING.request()))
        before, codes = server.rss(), set()
        for number in range(3000):
            method, path, good = routes[number % 2]
            response = client.request(method, path, content=malformed(rng, good), headers=STREAM_HEADERS)
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                codes.add(response.json()["code"])
        assert {"malformed_frame", "too_large", "checksum_mismatch", "unsupported_version", "invalid_request"} <= codes
        assert server.rss() - before < 48 * 2**20
        assert client.get("/readyz").status_code == 200


def test_a_claimed_size_takes_no_memory(serve: Serve):
    """A header may promise what it likes: nothing is allocated beyond the budget, nothing touched before it comes."""
    server = serve(budget=2**30)
    spec = sequential(8192, 8192)
    claim = Training(sequential(8, 8)).request(steps=(0,)).header
    rows = [
        {"name": p.name, "dtype": "float32", "shape": list(p.shape), "digest": bytes(16), "snapshot": i}
        for i in range(3)
        for p in spec.parameters
    ]
    message = {"spec": spec.model_dump(mode="json", exclude_none=True), "k": 1, "predictor": "linear"}
    packed = msgpack.packb({"version": 1, "kind": claim.kind, "message": message, "tensors": rows})
    with server.client() as client:
        before = server.rss()
        response = client.post("/nowcast", content=struct.pack("<I", len(packed)) + packed, headers=STREAM_HEADERS)
        error(response, 413, "too_large")
        rows = rows[:2]
        packed = msgpack.packb({"version": 1, "kind": claim.kind, "message": message, "tensors": rows})
        for _ in range(5):
            response = client.post("/nowcast", content=struct.pack("<I", len(packed)) + packed, headers=STREAM_HEADERS)
            error(response, 400, "malformed_frame")
        assert server.rss() - before < 32 * 2**20
        assert "nowcast_held_bytes 0.0" in client.get("/metrics").text


def test_a_silent_client_is_given_up(serve: Serve):
    server = serve(upload_idle=0.5, max_uploads=1, max_queue=1)
    request, head = raw_request("/nowcast", body(TRAINING.request()), method="POST")
    with socket.create_connection(("127.0.0.1", server.port)) as connection, server.client() as client:
        connection.sendall(request[: head + 100])
        time.sleep(0.2)
        error(send(client, "POST", "/nowcast", TRAINING.request()), 429, "busy")
        connection.settimeout(10)
        assert b"504" in connection.recv(65536).split(b"\r\n")[0]
        tensors(send(client, "POST", "/nowcast", TRAINING.request()))


def test_json_bodies_are_capped_and_checked(serve: Serve):
    server = serve(max_json=10_000)
    with server.client() as client:
        error(client.put("/v1/sessions/s", content=b" " * 10_001), 413, "too_large")
        for bad in (b"", b"{", b"[]", b'{"spec": 1}', b'{"spec": {}}', b"\xff", b"[" * 5000, b'{"keep": 1e999}'):
            response = client.put("/v1/sessions/s", content=bad)
            assert response.status_code == 422, response.text
            assert response.json()["code"] in ("invalid_request", "invalid_spec")
