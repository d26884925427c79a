"""Every failure of the HTTP side as the one error body."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from nowcast_proto.errors import InvalidRequest, MethodNotAllowed, NotFound, NowcastError
from starlette.exceptions import HTTPException


def error_response(error: NowcastError) -> Response:
    """The reply for an error: its status, the error body, Retry-After where trying again makes sense."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if "allow" in error.detail:
        headers["Allow"] = str(error.detail["allow"])
    return JSONResponse(error.body().model_dump(mode="json"), status_code=error.http_status, headers=headers)


def from_http(request: Request, exc: HTTPException) -> NowcastError:
    """The typed error for one of the framework's own."""
    if exc.status_code == 405:
        allow = (exc.headers or {}).get("Allow", "")
        return MethodNotAllowed(
            f"{request.method} is not served on this route",
            expected=f"one of {allow}" if allow else None,
            detail={"allow": allow} if allow else {},
        )
    if exc.status_code == 404:
        return NotFound("no such route", remedy="see /docs for the routes that exist")
    return InvalidRequest(str(exc.detail)[:300])


def from_validation(exc: RequestValidationError) -> InvalidRequest:
    """The typed error for a path, query or header value that does not validate."""
    first = exc.errors()[0]
    where = " ".join(str(part) for part in first["loc"])[:160]
    return InvalidRequest(f"{where}: {first['msg'][:300]}", remedy="correct the field named")


def install(app: FastAPI) -> None:
    """Route every exception an endpoint may raise through `error_response`; what is left, the gate answers."""

    def typed(kind: type[Exception], convert: Callable[[Request, Any], NowcastError]) -> None:
        async def answer(request: Request, exc: Exception) -> Response:
            error = convert(request, exc)
            request.scope["nowcast_error"] = error.code
            return error_response(error)

        app.add_exception_handler(kind, answer)

    typed(NowcastError, lambda _, exc: exc)
    typed(HTTPException, from_http)
    typed(RequestValidationError, lambda _, exc: from_validation(exc))
