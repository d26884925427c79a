"""The application as an ASGI server sees it: bodies are bytes, HEAD has none."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from nowcast_proto.arrays import frame_of
from nowcast_proto.messages import NowcastRequest
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Encoder
from nowcast_proto.version import MEDIA_TYPE
from nowcast_service.http.app import create_app
from nowcast_service.runtime.keys import KeyRing
from nowcast_service.settings import Settings


async def call(app: Any, method: str, path: str, body: bytes = b"", kind: str = "") -> tuple[int, list[Any]]:
    """Status and pieces of body of one request, as they were sent."""
    events = iter([{"type": "http.request", "body": body, "more_body": False}])
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        found = next(events, None)
        return found if found is not None else await asyncio.sleep(3600)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": headers,
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    return sent[0]["status"], [message.get("body", b"") for message in sent[1:]]


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/nowcast"), ("GET", "/metrics"), ("GET", "/docs"), ("HEAD", "/docs")]
)
def test_bodies_are_bytes(method: str, path: str):
    spec = ArchitectureSpec.model_validate(
        {"family": "sequential", "parameters": [{"name": "0.weight", "shape": [4, 4]}]}
    )
    frames = [frame_of("0.weight", np.full((4, 4), i, np.float32), snapshot=i) for i in range(2)]
    encoder = Encoder(NowcastRequest.KIND, NowcastRequest(spec=spec, k=1, predictor="linear"), frames)
    body = b"".join(bytes(chunk) for chunk in encoder.chunks()) if method == "POST" else b""

    async def main() -> None:
        app = create_app(Settings(predictor="linear"))
        async with app.router.lifespan_context(app):
            status, pieces = await call(app, method, path, body, MEDIA_TYPE)
        assert status == 200
        assert {type(piece) for piece in pieces} == {bytes}
        assert bool(b"".join(pieces)) == (method != "HEAD")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "status"),
    [(MemoryError(), 503), (RuntimeError("can't start new thread"), 503), (RuntimeError("a fault"), 500)],
    ids=["memory", "threads", "a fault of ours"],
)
def test_want_of_memory_is_no_fault(error: Exception, status: int, monkeypatch: pytest.MonkeyPatch):
    """It passes, and the client may try again; anything else is a fault."""

    async def main() -> None:
        app = create_app(Settings(predictor="linear"))

        def fails(ring: KeyRing, key: str | None) -> str:
            raise error

        monkeypatch.setattr(KeyRing, "tenant", fails)
        async with app.router.lifespan_context(app):
            assert (await call(app, "GET", "/metrics"))[0] == status

    asyncio.run(main())
