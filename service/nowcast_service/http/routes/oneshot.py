"""One call: snapshots in, future parameters out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping

from fastapi import APIRouter, Request
from fastapi.responses import Response
from nowcast_proto.errors import DeadlineExceeded
from nowcast_proto.messages import NowcastRequest
from nowcast_proto.stream import Decoder, Encoder, Sink
from nowcast_proto.stream import Header as StreamHeader
from nowcast_proto.version import (
    ROUTE_NOWCAST,
    ROUTE_NOWCAST_V1,
)
from torch import Tensor

from nowcast_service.http.bodies import StreamReply, check_media_type, receive_stream
from nowcast_service.http.routes.common import (
    ERRORS,
    STREAM,
    STREAM_BODY,
    ServiceOf,
    TenantOf,
    answered,
    reply_header,
)
from nowcast_service.predictors.base import check_count, check_horizon
from nowcast_service.runtime.answer import Prediction, predict
from nowcast_service.runtime.arrival import (
    check_finite,
    check_tensors,
    packed_bytes,
    packed_sink,
    spec_bytes,
    spec_memory,
    tensor_of,
)
from nowcast_service.runtime.budget import Reservation
from nowcast_service.runtime.catalogue import Key
from nowcast_service.runtime.device_queue import Check, Job
from nowcast_service.runtime.long_messages import of_stream
from nowcast_service.runtime.service import Service

router = APIRouter(responses=ERRORS)


@router.post(
    ROUTE_NOWCAST_V1,
    tags=["one-shot"],
    summary="Snapshots in, future parameters out",
    response_class=Response,
    responses={200: {"description": "The nowcast, a `nowcast.reply` stream.", "content": STREAM}},
    openapi_extra=STREAM_BODY,
)
@router.post(ROUTE_NOWCAST, include_in_schema=False)
async def nowcast(request: Request, service: ServiceOf, tenant: TenantOf) -> Response:
    """Predict from the snapshots in the body, a `nowcast.request` stream; answers when done or at the deadline."""
    began = time.monotonic()
    check_media_type(request)
    # A place first, then the upload: what will not be computed need not be sent.
    place = service.engine.admit(tenant)
    held: list[Reservation] = []
    job: Job[Prediction] | None = None
    try:
        message, key, snapshots = await _receive_history(request, service, tenant, held)
        received = time.monotonic()
        deadline = message.deadline or service.settings.default_deadline

        predictor = await service.predictor(key)

        def work(check: Check) -> Prediction:
            return predict(predictor, message.spec, snapshots, message, graphs=service.specs, check=check)

        job = service.submit(place, key, message.spec, work, seconds=deadline - (received - began))
        await answered(request, job, deadline - (received - began))
        prediction = job.result()
    except BaseException:
        if job is None:
            place.release()
            _let_go(service, held)
        else:
            service.engine.abandon(job)
            job.future.add_done_callback(lambda _: _let_go(service, held))
        raise
    service.metrics.stages.labels("input").observe(received - began)
    reply = reply_header(uuid.uuid4().hex, message, key, service, job, received - began)
    reply = reply.model_copy(update={"spec_digest": message.spec.digest()})
    return StreamReply(
        Encoder(reply.KIND, reply, prediction.frames, service.settings.limits),
        count=service.count_out,
        done=lambda _: _let_go(service, held),
    )


async def _receive_history(
    request: Request, service: Service, tenant: str, held: list[Reservation]
) -> tuple[NowcastRequest, Key, list[Mapping[str, Tensor]]]:
    """The question and the snapshots of a one-shot body, whose memory is reserved into ``held`` before it is taken.

    What can be refused is refused when its header is there, before the snapshots.

    Raises:
        DeadlineExceeded: It was not whole at its deadline: a place is held meanwhile.
    """
    found: list[tuple[NowcastRequest, Key]] = []
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def reserve(nbytes: int, seconds: float) -> None:
        held.append(service.sessions.reserve(tenant, nbytes, "the nowcast"))
        limit.reschedule(began + seconds)

    def opened(header: StreamHeader) -> Sink:  # runs in a thread
        message = of_stream(NowcastRequest, header)
        key = service.catalogue.resolve(message)
        predictor = service.catalogue.predictor(key)
        check_horizon(message.k, predictor.farthest)
        check_count(header.snapshots, predictor.context, f"predictor {predictor.name}")
        check_tensors(message.spec, header)
        found.append((message, key))
        nbytes = packed_bytes(header.tensors) + spec_bytes(message.spec) + spec_memory(message.spec)
        seconds = message.deadline or service.settings.default_deadline
        asyncio.run_coroutine_threadsafe(reserve(nbytes, seconds), loop).result()
        return packed_sink(header)

    decoder = Decoder(opened, service.settings.limits, check_finite)
    try:
        with service.upload(tenant):
            async with asyncio.timeout(service.settings.default_deadline) as limit:
                await receive_stream(request, decoder, idle=service.settings.upload_idle, count=service.count_in)
    except TimeoutError as exc:
        raise DeadlineExceeded(
            "the request had not arrived whole at its deadline", remedy="give a longer deadline, or use a session"
        ) from exc
    header = decoder.finish()
    snapshots: list[dict[str, Tensor]] = [{} for _ in range(header.snapshots)]
    for frame in decoder.frames:
        snapshots[frame.snapshot][frame.name] = tensor_of(frame)
    message, key = found[0]
    return message, key, list(snapshots)


def _let_go(service: Service, held: list[Reservation]) -> None:
    for reservation in held:
        reservation.release()
    service.memory.freed()
