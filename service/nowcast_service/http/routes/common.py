"""What the routes share: who asks, of which session, and how an answer is waited for and described."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Request
from nowcast_proto.errors import DeadlineExceeded, ErrorBody, InvalidRequest
from nowcast_proto.messages import (
    NowcastJob,
    NowcastReplyHeader,
    NowcastRequest,
    Timings,
)
from nowcast_proto.version import (
    HEADER_SESSION,
    ID_PATTERN,
    MEDIA_TYPE,
)
from starlette.requests import ClientDisconnect

from nowcast_service.http.bodies import disconnected
from nowcast_service.runtime.answer import Prediction
from nowcast_service.runtime.catalogue import Key
from nowcast_service.runtime.device_queue import Job, finished
from nowcast_service.runtime.service import Service

STREAM = {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "Every error has this body; its status and code say which it is."}
}
STREAM_BODY = {"requestBody": {"required": True, "content": STREAM}}


def json_body(model: str, example: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI of a JSON body that the endpoint reads itself, so that its cap holds before it is parsed."""
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}


async def the_service(request: Request) -> Service:
    """The service this application runs."""
    service: Service = request.app.state.service
    return service


async def the_tenant(request: Request) -> str:
    """Whose key the request carries; the gate has checked it."""
    tenant: str = request.scope["nowcast_tenant"]
    return tenant


async def the_session_id(
    session: Annotated[str, Path(pattern=ID_PATTERN, description="Session id, minted by the client.")],
    repeated: Annotated[
        str | None, Header(alias=HEADER_SESSION, description="The session id again, for proxies to route by.")
    ] = None,
) -> str:
    """The session id of the path, which the header repeats where it is sent."""
    if repeated is not None and repeated != session:
        raise InvalidRequest(
            f"header {HEADER_SESSION} says {repeated[:64]!r}", expected=f"{session!r}, as the path says"
        )
    return session


ServiceOf = Annotated[Service, Depends(the_service)]
TenantOf = Annotated[str, Depends(the_tenant)]
SessionId = Annotated[str, Depends(the_session_id)]
StepPath = Annotated[int, Path(ge=0, le=2**53 - 1, description="Optimizer step the snapshot was read after.")]
NowcastId = Annotated[str, Path(pattern=ID_PATTERN, description="Nowcast id, minted by the client.")]

SMALL = 1 << 20
"""Cap on JSON bodies that hold no spec."""


async def answered(request: Request, job: Job[Prediction], seconds: float) -> None:
    """Wait for a job as long as its client does.

    Raises:
        DeadlineExceeded: It did not end in time.
        ClientDisconnect: The client went away.
    """
    gone = asyncio.ensure_future(disconnected(request))
    ended = asyncio.ensure_future(finished(job, seconds))
    try:
        await asyncio.wait({gone, ended}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not ended.done():
            raise ClientDisconnect
        if not await ended:
            raise DeadlineExceeded(
                f"the nowcast was still {job.state} at its deadline",
                remedy="give a longer deadline, or use a session and fetch the answer later",
            )
    finally:
        gone.cancel()
        ended.cancel()


def reply_header(
    name: str,
    request: NowcastRequest | NowcastJob,
    key: Key,
    service: Service,
    job: Job[Prediction],
    input_seconds: float = 0.0,
) -> NowcastReplyHeader:
    prediction = job.result()
    return NowcastReplyHeader(
        nowcast=name,
        k=request.k,
        predictor=service.catalogue.predictor(key).name,
        checkpoint=key[1],
        reply=request.reply,
        update_scale=request.update_scale,
        spec_digest="",
        timings=Timings(
            queue=0.0 if job.started is None else job.started - job.enqueued,
            input=input_seconds,
            compute=prediction.compute,
            output=prediction.output,
        ),
        coverage=prediction.coverage,
    )
