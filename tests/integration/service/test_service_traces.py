"""One trace from a training's snapshot over the queue to the engine's stages and the patch, at a real OTLP receiver."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from .service_harness import Serve, eventually

pb = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

pytestmark = pytest.mark.socket

TRAINING = """
import sys
import torch
from nowcast_client import attach
from nowcast_service.observe import traces

traces.set_up()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
with attach(model, optimizer, sys.argv[1], period=100, total_steps=1000, wait=60, trial=False, report=False) as handle:
    for _ in range(110):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    handle.wait()
traces.shut_down()
"""


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP endpoint over HTTP, and the spans it was sent with the service they are of."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = pb.ExportTraceServiceRequest()
            sent.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            spans.extend(span for r in sent.resource_spans for s in r.scope_spans for span in s.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", spans
    server.shutdown()


def test_one_trace_from_snapshot_to_patch(serve: Serve, receiver: tuple[str, list[Any]], monkeypatch: Any) -> None:
    address, spans = receiver
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    server = serve()
    command = [sys.executable, "-c", TRAINING, server.url]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert eventually(lambda: {"patch", "compute"} <= {span.name for span in spans})

    def above(span: Any) -> list[str]:
        """Names from a span up to its root."""
        by_id = {one.span_id: one for one in spans}
        names = []
        while span is not None:
            if not span.name.startswith("fastapi."):  # what the framework itself does on the way
                names.append(span.name)
            span = by_id.get(span.parent_span_id)
        return names

    (patch,) = [span for span in spans if span.name == "patch"]
    assert above(patch) == ["patch", "nowcast.window"]
    ours = {span.name: span for span in spans if span.trace_id == patch.trace_id}
    asked = "POST /v1/sessions/{session}/nowcasts"
    for stage in ("queue", "compute", "output"):
        assert above(ours[stage]) == [stage, "nowcast", asked, "ask", "nowcast.window"]
    uploads = [
        s for s in spans if s.trace_id == patch.trace_id and s.name.startswith("PUT /v1/sessions/{session}/snap")
    ]
    assert len(uploads) == 5
    assert above(uploads[0])[1:] == ["snapshot", "nowcast.window"]
    assert ours["queue"].end_time_unix_nano <= ours["compute"].start_time_unix_nano + 1
    assert ours["compute"].end_time_unix_nano <= patch.start_time_unix_nano


def test_a_caller_of_any_kind_names_its_trace(serve: Serve, receiver: tuple[str, list[Any]], monkeypatch: Any) -> None:
    address, spans = receiver
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    with serve().client() as client:
        client.get("/v1/models", headers={"traceparent": f"00-{trace}-{parent}-01"}).raise_for_status()
        client.get("/v1/models", headers={"traceparent": "no-trace-at-all"}).raise_for_status()
    assert eventually(lambda: sum(span.name == "GET /v1/models" for span in spans) == 2)
    found = {span.trace_id.hex(): span.parent_span_id.hex() for span in spans if span.name == "GET /v1/models"}
    assert found[trace] == parent
    assert len(found) == 2
