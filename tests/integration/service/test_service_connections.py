"""Bytes, silence and crowds before any key: every state of a connection has a bound on bytes and on time."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator

import pytest

from .service_harness import Server, eventually

pytestmark = pytest.mark.socket

KEY = "nc_the_key_of_the_test"
POST = b"POST /nowcast HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"

ENDLESS = {
    "one header": (HEALTH + b"A: ", b"x"),
    "many headers": (HEALTH, b"a: b\r\n"),
    "request line": (b"GET /", b"x"),
    "blank lines": (b"", b"\r\n"),
    "blank lines after an answer": (HEALTH + b"\r\n", b"\r\n"),
    "trailers": (CHUNKED + b"0\r\n", b"a: b\r\n"),
    "one trailer": (CHUNKED + b"0\r\na: ", b"x"),
    "trailers after a body": (CHUNKED + b"4\r\nabcd\r\n0\r\n", b"a: b\r\n"),
    "chunk extension": (CHUNKED + b"4;a=", b"x"),
    "chunk size": (CHUNKED, b"0"),
    "body after a refusal": (POST + b"Content-Length: 99999999999\r\n\r\n", b"x"),
    "chunks after a refusal": (CHUNKED, b"1\r\nx\r\n"),
    "body nobody asked for": (HEALTH + b"Content-Length: 99999999999\r\n\r\n", b"x"),
    "body before its 100": (POST + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n", b"x"),
    "bytes after an upgrade": (HEALTH + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", b"x"),
    "bytes of a tunnel": (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", b"x"),
    "no HTTP": (b"", b"\x16\x03\x01"),
    "requests, answers unread": (b"", HEALTH + b"\r\n"),
    "requests of which one is unfinished": (POST + b"Content-Length: 9\r\n\r\n", HEALTH + b"\r\n"),
}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that asks for a key, with little patience and few connections."""
    settings = {"API_KEY": KEY, "UPLOAD_IDLE": "1", "MAX_CONNECTIONS": "8"}
    folder = tmp_path_factory.mktemp("strict")
    running = Server(folder, {f"NOWCAST_{name}": value for name, value in settings.items()}).start()
    yield running
    running.stop()


def ended(peer: socket.socket) -> bool:
    """Whether the server has ended the connection; what it answered is thrown away."""
    peer.settimeout(0.01)
    try:
        return peer.recv(1 << 16) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("shape", ENDLESS)
def test_endless_bytes_are_cut_off(strict: Server, shape: str):
    begin, more = ENDLESS[shape]
    block = more * ((1 << 16) // len(more))
    before = strict.settled(0.5)
    strict.reset_peak()
    sent = 0
    with socket.create_connection(("127.0.0.1", strict.port), 60) as peer, contextlib.suppress(OSError):
        peer.sendall(begin)
        while sent < 1 << 28:
            sent += peer.send(block)
    assert sent < 1 << 28, f"{sent >> 20} MiB were taken"
    assert strict.peak() - before < 1 << 25


@pytest.mark.parametrize("shape", [shape for shape in ENDLESS if shape != "requests, answers unread"])
def test_a_trickle_is_cut_off(strict: Server, shape: str):
    """A byte every so often, well before any time without a byte is over."""
    begin, more = ENDLESS[shape]
    trickle = itertools.cycle(more)
    with socket.create_connection(("127.0.0.1", strict.port), 60) as peer:
        peer.sendall(begin)

        def cut() -> bool:
            with contextlib.suppress(OSError):
                peer.send(bytes([next(trickle)]))
            time.sleep(0.05)
            return ended(peer)

        assert eventually(cut, 60)


def test_silence_is_cut_off_and_idleness_is_not(strict: Server):
    with socket.create_connection(("127.0.0.1", strict.port)) as silent, strict.client() as idle:
        assert idle.get("/healthz").status_code == 200
        connection = idle._transport._pool.connections[0]
        assert eventually(lambda: ended(silent))
        assert idle.get("/healthz").status_code == 200
        assert idle._transport._pool.connections[0] is connection


def test_a_crowd_keeps_nobody_out(strict: Server):
    """Forty connections that say nothing or half a line: whoever has something to say is served at once."""
    crowd = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(40)]
    try:
        for number, peer in enumerate(crowd):
            if number % 2:
                with contextlib.suppress(OSError):
                    peer.sendall(HEALTH)
        with strict.client(KEY) as client:
            assert client.get("/v1/models").status_code == 200
            assert eventually(lambda: sum(not ended(peer) for peer in crowd) < 8)
    finally:
        for peer in crowd:
            peer.close()


def test_whoever_is_refused_in_the_middle_of_a_body_can_read_why(strict: Server):
    body = b"x" * (8 << 20)
    with socket.create_connection(("127.0.0.1", strict.port), 60) as peer:
        peer.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body))
        peer.sendall(body)
        assert peer.recv(1 << 16).startswith(b"HTTP/1.1 401")
        # The body came whole, so the connection goes on.
        peer.sendall(HEALTH + b"\r\n")
        assert b"200 OK" in peer.recv(1 << 16)


def test_many_fields_are_a_bad_request(strict: Server):
    with socket.create_connection(("127.0.0.1", strict.port), 60) as peer:
        peer.sendall(HEALTH + b"a: b\r\n" * 200 + b"\r\n")
        assert peer.recv(1 << 16).startswith(b"HTTP/1.1 400")
