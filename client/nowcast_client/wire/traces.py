"""The training's part of a trace: snapshots, the ask, the patch; and its place in the service's part.

Spans are made with the training's own OpenTelemetry, where it has set one up; without the library, or without a
provider, nothing happens here and nothing is sent. The service goes on below the ``traceparent`` it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # OpenTelemetry is the training's own; without it there are no traces
    trace = None  # type: ignore[assignment]

_NAME = "nowcast"
Attribute = str | int | float


class Root:
    """The span over one window: from its first snapshot to the patch, or to where it was given up.

    It begins with the first span below it.

    Args:
        name: Its name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._span: Any = None

    @contextmanager
    def span(self, name: str, **attributes: Attribute) -> Iterator[None]:
        """A span below it, around what is done meanwhile; attributes get the prefix ``nowcast.``."""
        if trace is None:
            yield
            return
        tracer = trace.get_tracer(_NAME)
        if self._span is None:
            self._span = tracer.start_span(self._name)
        told = {f"nowcast.{key}": value for key, value in attributes.items()}
        with tracer.start_as_current_span(name, trace.set_span_in_context(self._span), attributes=told):
            yield

    def end(self) -> None:
        """End it; safe to call more than once."""
        if self._span is not None and self._span.is_recording():
            self._span.end()


def headers() -> dict[str, str]:
    """Headers that say where in a trace a request belongs; none where there is no trace."""
    carried: dict[str, str] = {}
    if trace is not None:
        TraceContextTextMapPropagator().inject(carried)
    return carried
