"""What people watch: the list of trainings, one training, changes as they happen, and how the service itself is."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response, StreamingResponse
from nowcast_proto.errors import ErrorBody, NotFound
from nowcast_proto.trainings import GraphReply, Report, ReportReply, StatusReply, Training, TrainingsReply
from nowcast_proto.version import (
    ID_PATTERN,
    ROUTE_REPORTS,
    ROUTE_STATUS,
    ROUTE_TRAINING,
    ROUTE_TRAINING_GRAPH,
    ROUTE_TRAININGS,
    ROUTE_WATCH,
)
from pydantic import TypeAdapter

from nowcast_service.graph.picture import picture
from nowcast_service.http import examples
from nowcast_service.http.bodies import read_model
from nowcast_service.http.routes.common import SMALL, ServiceOf, SessionId, TenantOf, json_body
from nowcast_service.runtime.trainings import Watched, Watcher

PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/favicon.ico": ("icon.svg", "image/svg+xml"),
}
"""Path -> file of the package, and its type. They hold nobody's data and need no key."""
_SAFE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_TOGETHER = 0.05
"""Seconds that changes are collected before they are sent: what many trainings say at once is one message."""
_HEARTBEAT = 15.0
_ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorBody, "description": "The one error body."}}

router = APIRouter(responses=_ERRORS)
TrainingId = Annotated[str, Path(pattern=ID_PATTERN, description="Id of a training: its session's.")]
_ROWS: TypeAdapter[TrainingsReply] = TypeAdapter(TrainingsReply)


def page(path: str) -> Response:
    """One file of the page."""
    name, kind = PAGE[path]
    data = (resources.files("nowcast_service") / "http" / "page" / name).read_bytes()
    return Response(data, headers={"Content-Type": kind, **_SAFE})


def _add_page() -> None:
    async def serve(request: Request) -> Response:
        return page(request.url.path)

    for path in PAGE:
        router.add_api_route(path, serve, include_in_schema=False, methods=["GET", "HEAD"])


_add_page()


@router.post(
    ROUTE_REPORTS,
    tags=["trainings"],
    summary="Say what a training did",
    response_model=ReportReply,
    openapi_extra=json_body("Report", examples.REPORT),
)
async def post_report(request: Request, service: ServiceOf, tenant: TenantOf, name: SessionId) -> ReportReply:
    """Take losses and events of a training, for those who watch it. Nothing is predicted from them."""
    report = await read_model(request, service, tenant, Report, cap=SMALL)
    service.board.report(tenant, name, report)
    return ReportReply(training=name)


@router.get(ROUTE_TRAININGS, tags=["trainings"], summary="All trainings", response_model=TrainingsReply)
async def get_trainings(service: ServiceOf, tenant: TenantOf) -> Response:
    """The trainings of this key, the newest first."""
    rows = TrainingsReply(trainings=service.board.rows(tenant))
    return Response(_ROWS.dump_json(rows), media_type="application/json")


@router.get(
    ROUTE_TRAINING,
    tags=["trainings"],
    summary="One training",
    response_model=Training,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)
async def get_training(
    service: ServiceOf,
    tenant: TenantOf,
    training: TrainingId,
    format: Annotated[Literal["json", "csv"], Query(description="`csv`: one line a loss or event.")] = "json",
) -> Response:
    """Losses, events and movements; as JSON, or as CSV for a spreadsheet."""
    found = service.board.get(tenant, training).whole()
    if format == "csv":
        name = f'attachment; filename="nowcast-{training}.csv"'
        return Response(_csv(found), media_type="text/csv", headers={"Content-Disposition": name})
    return Response(found.model_dump_json(), media_type="application/json")


def _csv(training: Training) -> str:
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(("step", "loss", "event", "horizon", "reason"))
    rows: list[tuple[int, object, str, object, str]] = [
        (step, loss, "", "", "") for step, loss in zip(training.loss_steps, training.losses, strict=True)
    ]
    rows += [(e.step, "", e.kind, e.horizon or "", e.reason or "") for e in training.events]
    rows.sort(key=lambda row: row[0])
    lines.writerows(rows)
    return text.getvalue()


@router.get(ROUTE_TRAINING_GRAPH, tags=["trainings"], summary="Its neural graph", response_model=GraphReply)
async def get_training_graph(service: ServiceOf, tenant: TenantOf, training: TrainingId) -> GraphReply:
    """The neural graph by ranges of neurons, for a drawing."""
    spec = service.board.get(tenant, training).spec
    if spec is None:
        raise NotFound("the graph of this training is not kept: it is of an earlier process, or its spec is large")
    return picture(await service.graph(tenant, spec))


@router.get(
    ROUTE_WATCH,
    tags=["trainings"],
    summary="Changes as they happen",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def watch(
    request: Request,
    service: ServiceOf,
    tenant: TenantOf,
    training: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="Also send what is new of this training.")
    ] = None,
) -> StreamingResponse:
    """Server-sent events: `rows`, the lines that changed; `training`, what is new of the one that is looked at.

    The first `rows` has every line. `again` asks to fetch the training whole: its means were merged.
    """
    watcher = service.board.watch(tenant)
    stream = _changes(request, service, watcher, training)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _changes(
    request: Request, service: ServiceOf, watcher: Watcher, training: str | None
) -> AsyncIterator[bytes]:
    board = service.board
    try:
        place = _Place(board.get(watcher.tenant, training)) if training else None
    except NotFound:
        place = None
    try:
        yield _event("rows", _ROWS.dump_json(TrainingsReply(trainings=board.rows(watcher.tenant))))
        beat = time.monotonic()
        while not service.closing:
            changed = await watcher.next(1.0)
            if changed:
                await asyncio.sleep(_TOGETHER)
                changed |= await watcher.next(0.0)
                rows = tuple(board.get(watcher.tenant, one).row() for one in changed if board.has(watcher.tenant, one))
                yield _event("rows", _ROWS.dump_json(TrainingsReply(trainings=rows)))
                if place is not None and place.of.id in changed:
                    yield place.news()
            elif time.monotonic() - beat > _HEARTBEAT:
                yield b": still here\n\n"
                beat = time.monotonic()
            if await request.is_disconnected():
                return
    finally:
        board.unwatch(watcher)


class _Place:
    """How far a watcher has been told of a training."""

    def __init__(self, of: Watched) -> None:
        self.of = of
        self._stand()

    def _stand(self) -> None:
        of = self.of
        self._version = of.losses.version
        self._losses = len(of.losses)
        self._events = of.counted
        self._movement = of.movements[-1].step if of.movements else -1

    def news(self) -> bytes:
        """What is new of it since the last call."""
        of, losses = self.of, self.of.losses
        if losses.version != self._version:
            self._stand()
            return _event("again", b"{}")
        first = max(0, self._losses - 1)  # the last mean may have grown
        new = of.counted - self._events
        data = {
            "first": first,
            "loss_steps": list(losses.steps[first:]),
            "losses": list(losses.means[first:]),
            "events": [e.model_dump(exclude_none=True) for e in list(of.events)[len(of.events) - new :]] if new else [],
            "movements": [m.model_dump() for m in of.movements if m.step > self._movement],
        }
        self._stand()
        return _event("training", json.dumps(data, separators=(",", ":")).encode())


def _event(kind: str, data: bytes) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


@router.get(ROUTE_STATUS, tags=["service"], summary="How the service is", response_model=StatusReply)
async def get_status(service: ServiceOf) -> StatusReply:
    """Queue, budgets and limits, in numbers."""
    return service.status()
