"""Traces: what a nowcast spent its time on. Off unless OpenTelemetry's own variables say where spans are sent.

FastAPI makes the spans of requests and hangs them below the caller's ``traceparent``; those of a nowcast's stages hang
below the request that asked for it. So a training's snapshot, the queue, the engine and the patch are one trace.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context

log = logging.getLogger(__name__)
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""OpenTelemetry's own variables that say where spans are sent; one of them turns tracing on."""
_NAME = "nowcast"


def set_up() -> bool:
    """Send spans where OpenTelemetry's variables say, in the background; whether anything is sent."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return False
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as missing:
        log.warning("traces are asked for, and %s is missing: pip install 'nowcast-sidecar[otel]'", missing.name)
        return False
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": _NAME}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


def shut_down() -> None:
    """Send what has not been sent; within a few seconds."""
    if hasattr(provider := trace.get_tracer_provider(), "shutdown"):
        provider.shutdown()


def here() -> Context:
    """Where the work now going on belongs, to hang spans below later, from another thread."""
    return contexts.get_current()


def stages(at: Context, ended: float, seconds: Mapping[str, float], attributes: Mapping[str, str | int]) -> None:
    """Spans of one nowcast, from stages that were timed elsewhere.

    Args:
        at: Where they belong, from `here`.
        ended: When the last stage ended, on the monotonic clock.
        seconds: Stage -> seconds, in the order they ran; what lies between two is the device's.
        attributes: Of the span over all of them.
    """
    tracer, offset = trace.get_tracer(_NAME), time.time() - time.monotonic()
    begins = ended - sum(seconds.values())
    whole = tracer.start_span("nowcast", at, attributes=dict(attributes), start_time=_ns(begins + offset))
    inside = trace.set_span_in_context(whole, at)
    for stage, length in seconds.items():
        span = tracer.start_span(stage, inside, start_time=_ns(begins + offset))
        begins += length
        span.end(_ns(begins + offset))
    whole.end(_ns(ended + offset))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
