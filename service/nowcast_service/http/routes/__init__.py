"""The HTTP routes: bodies in and out, one call of sessions or engine in between."""

from __future__ import annotations

from fastapi import APIRouter

from nowcast_service.http.routes import oneshot, operations, sessions, trainings

router = APIRouter()
for part in (oneshot, sessions, trainings, operations):
    router.include_router(part.router)
