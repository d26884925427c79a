"""The service itself: what it can do, how it is."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response
from nowcast_proto.messages import (
    HealthReply,
    ModelsReply,
)
from nowcast_proto.version import (
    ROUTE_HEALTH,
    ROUTE_METRICS,
    ROUTE_MODELS,
    ROUTE_READY,
    SERVED_VERSIONS,
)

from nowcast_service.http.routes.common import (
    ERRORS,
    ServiceOf,
)
from nowcast_service.observe.metrics import CONTENT_TYPE
from nowcast_service.runtime.service import version

router = APIRouter(responses=ERRORS)


@router.get(ROUTE_MODELS, tags=["service"], summary="Predictors and checkpoints", response_model=ModelsReply)
def get_models(service: ServiceOf) -> ModelsReply:
    """What a request may name, and the caps it has to keep to."""
    settings = service.settings
    return ModelsReply(
        models=service.catalogue.models(),
        families=service.catalogue.families(),
        protocol_versions=SERVED_VERSIONS,
        limits={
            "max_header": int(settings.max_header),
            "max_json": int(settings.max_json),
            "max_tensors": settings.max_tensors,
            "max_snapshots": settings.max_snapshots,
            "max_tensor": int(settings.max_tensor),
            "max_body": int(settings.max_body),
            "session_budget": int(settings.session_budget),
        },
    )


@router.get(ROUTE_HEALTH, tags=["service"], summary="The process lives", response_model=HealthReply)
async def get_health() -> HealthReply:
    """Answers as long as the event loop runs. Needs no key."""
    return HealthReply(version=version())


@router.get(ROUTE_READY, tags=["service"], summary="Nowcasts get done", response_model=HealthReply)
async def get_ready(service: ServiceOf) -> HealthReply:
    """A real small forward pass came through the queue, and nothing is stuck in it. Needs no key."""
    return HealthReply(version=version(), checks=await service.readiness.check())


@router.get(
    ROUTE_METRICS,
    tags=["service"],
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text."}},
)
async def get_metrics(service: ServiceOf) -> Response:
    """Queue, input, compute and output times, bytes, failures by reason, snapshot age, verdicts."""
    return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})
