"""The application: a gate in front (keys, logs, counts, last resort), the routes behind it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from nowcast_proto.errors import InternalError, NowcastError, Unavailable
from nowcast_proto.messages import (
    NowcastJob,
    NowcastReplyHeader,
    NowcastRequest,
    SessionCreate,
    SnapshotHeader,
    Verdict,
)
from nowcast_proto.trainings import Report
from nowcast_proto.version import HEADER_INSTANCE, ROUTE_HEALTH, ROUTE_READY, ROUTE_REPORTS, ROUTE_STATUS
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nowcast_service.http.errors import error_response, install
from nowcast_service.http.reference import reference
from nowcast_service.http.routes import router
from nowcast_service.http.routes.trainings import PAGE
from nowcast_service.observe import traces
from nowcast_service.observe.logs import FIELDS
from nowcast_service.runtime.container import processors
from nowcast_service.runtime.service import Service, version
from nowcast_service.settings import Settings

log = logging.getLogger(__name__)

OPEN_ROUTES = frozenset({ROUTE_HEALTH, ROUTE_READY, *PAGE})
"""Routes that need no key: probes, and the files of the page, which ask for one."""
QUIET_ROUTES = OPEN_ROUTES | {ROUTE_REPORTS, ROUTE_STATUS}
"""Routes that are asked every few seconds: where they succeed their log line is one for debugging."""
_DOCUMENTED = (SessionCreate, NowcastJob, Verdict, Report, NowcastRequest, NowcastReplyHeader, SnapshotHeader)


_WORD = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")


class Gate:
    """Outermost layer. Checks the key before anything else is looked at, counts and logs each request, and answers
    what nothing else did: a bug becomes an error body that discloses nothing.

    Args:
        app: What lies behind.
        service: Keys and metrics.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._instance = (HEADER_INSTANCE.lower().encode(), uuid.uuid4().hex[:12].encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = 0
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id"))
        scope["nowcast_said"] = {"request": request_id, **_trace(headers.get(b"traceparent"))}
        # HEAD is GET without a body, on every route.
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                said = ((b"x-request-id", request_id.encode()), self._instance)
                message = {**message, "headers": [*message.get("headers", ()), *said]}
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            if scope["path"] not in OPEN_ROUTES:
                value = headers.get(b"authorization")
                scope["nowcast_tenant"] = self._service.keys.tenant(value.decode("latin-1") if value else None)
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            status = status or 499
            scope["nowcast_error"] = "client_gone"
        except NowcastError as exc:
            scope["nowcast_error"] = exc.code
            await error_response(exc)(scope, receive, watched)
        except asyncio.CancelledError:  # the time to shut down in is over
            scope["nowcast_error"] = Unavailable.code
            if not status:
                error = Unavailable("the service is gone before the answer was there", retry_after=5.0)
                await error_response(error)(scope, receive, watched)
        except Exception as exc:  # the last resort; the traceback goes to the log, never to the peer
            failed: NowcastError = InternalError("the request failed inside the service", remedy="see its log")
            if isinstance(exc, MemoryError) or "can't start new thread" in str(exc):
                failed = Unavailable("the machine is short of memory", remedy="lower NOWCAST_BUDGET", retry_after=2.0)
                log.error("a request failed for want of memory: %r", exc)
            else:
                log.exception("a request failed")
            scope["nowcast_error"] = failed.code
            if status:
                raise  # the answer has begun: only cutting the connection tells the peer
            await error_response(failed)(scope, receive, watched)
        finally:
            self._note(scope, method, status, time.monotonic() - began)

    def _note(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        metrics = self._service.metrics
        route = getattr(scope.get("route"), "path", "other")
        known = method if method in ("GET", "HEAD", "PUT", "POST", "DELETE") else "other"
        metrics.requests.labels(route, known, str(status)).inc()
        code = scope.get("nowcast_error")
        if code is not None:
            metrics.failures.labels(code).inc()
        fields: dict[str, Any] = {
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "tenant": scope.get("nowcast_tenant", "-"),
            **scope["nowcast_said"],
            **({"error": code} if code else {}),
            **scope.get("path_params", {}),
        }
        quiet = route in QUIET_ROUTES and status == 200
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={FIELDS: fields})


def _request_id(said: bytes | None) -> str:
    """The id a proxy or client gave the request, where it is one word of sensible length; else a new one."""
    word = (said or b"").decode("latin-1")
    return word if _WORD.fullmatch(word) else uuid.uuid4().hex


def _trace(said: bytes | None) -> dict[str, str]:
    """Trace and parent of a W3C ``traceparent``."""
    found = _TRACEPARENT.fullmatch((said or b"").decode("latin-1"))
    return {"trace": found[1], "parent": found[2]} if found else {}


def create_app(settings: Settings | None = None) -> FastAPI:
    """Make the application.

    Args:
        settings: How it is set up; from the environment when absent.

    Returns:
        A FastAPI application whose ``state.service`` is its `Service`.

    Raises:
        NowcastError: Keys, checkpoint or predictor of the settings cannot be used.
    """
    service = Service(settings or Settings.read())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        torch.set_num_threads(service.settings.threads or processors())
        traces.set_up()
        service.start()
        housekeeping = asyncio.create_task(service.keep_house())
        yield
        housekeeping.cancel()
        await service.save()
        await asyncio.to_thread(traces.shut_down)
        service.stop()

    app = FastAPI(
        title="Nowcast",
        summary="Predicts where a training job's weights are heading.",
        description="Tensors travel as `application/vnd.nowcast.v1` streams (see docs/protocol.md), all else as JSON.",
        version=version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    app.include_router(router)
    app.add_api_route("/docs", partial(_docs, app), include_in_schema=False)
    install(app)
    app.add_middleware(Gate, service=service)
    _document(app, service)
    return app


async def _docs(app: FastAPI) -> HTMLResponse:
    return HTMLResponse(reference(app.openapi()))


def _document(app: FastAPI, service: Service) -> None:
    """Add what FastAPI cannot see to the OpenAPI document: bodies the endpoints read themselves, and the key."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            _, found = models_json_schema(
                [(model, "validation") for model in _DOCUMENTED], ref_template="#/components/schemas/{model}"
            )
            components = document.setdefault("components", {})
            components["schemas"] = {**found.get("$defs", {}), **components.get("schemas", {})}
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            if service.settings.has_keys:
                document["security"] = [{"key": []}]
                for path in OPEN_ROUTES:
                    document["paths"][path]["get"]["security"] = []
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
