"""The HTTP routes: bodies in and out, one call of sessions or engine in between."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from nowcast_proto.errors import DeadlineExceeded, ErrorBody, Expired, InvalidRequest, NowcastError
from nowcast_proto.messages import (
    HealthReply,
    ModelsReply,
    NowcastJob,
    NowcastReplyHeader,
    NowcastRequest,
    NowcastStatus,
    PredictionFields,
    SessionCreate,
    SessionState,
    SnapshotState,
    Timings,
    Verdict,
    VerdictReply,
    read_json,
    read_message,
)
from nowcast_proto.stream import Decoder, Encoder, Sink
from nowcast_proto.stream import Header as StreamHeader
from nowcast_proto.version import (
    HEADER_DIGEST,
    HEADER_OFFSET,
    HEADER_SESSION,
    ID_PATTERN,
    MEDIA_TYPE,
    ROUTE_HEALTH,
    ROUTE_METRICS,
    ROUTE_MODELS,
    ROUTE_NOWCAST,
    ROUTE_NOWCAST_V1,
    ROUTE_NOWCASTS,
    ROUTE_READY,
    ROUTE_SESSION,
    ROUTE_SESSION_NOWCAST,
    ROUTE_SNAPSHOT,
    ROUTE_VERDICTS,
    SERVED_VERSIONS,
)
from starlette.requests import ClientDisconnect
from torch import Tensor

from nowcast_service.http import examples
from nowcast_service.http.bodies import StreamReply, check_media_type, disconnected, read_all, receive_stream
from nowcast_service.observe.metrics import CONTENT_TYPE
from nowcast_service.predictors.base import Predictor, check_count, check_even, check_horizon, check_kept
from nowcast_service.runtime.answer import Prediction, predict
from nowcast_service.runtime.arrival import (
    check_finite,
    check_tensors,
    packed_bytes,
    packed_sink,
    spec_bytes,
    tensor_of,
)
from nowcast_service.runtime.budget import Reservation
from nowcast_service.runtime.catalogue import Key
from nowcast_service.runtime.device_queue import Check, Job
from nowcast_service.runtime.service import Service, finished, version
from nowcast_service.runtime.session import Nowcast, Session, job_digest

_STREAM = {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "Every error has this body; its status and code say which it is."}
}
_STREAM_BODY = {"requestBody": {"required": True, "content": _STREAM}}


def _json_body(model: str, example: dict[str, Any]) -> dict[str, Any]:
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

router = APIRouter(responses=_ERRORS)


# One shot


@router.post(
    ROUTE_NOWCAST_V1,
    tags=["one-shot"],
    summary="Snapshots in, future parameters out",
    response_class=Response,
    responses={200: {"description": "The nowcast, a `nowcast.reply` stream.", "content": _STREAM}},
    openapi_extra=_STREAM_BODY,
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
        await _answered(request, job, deadline - (received - began))
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
    reply = _reply_header(uuid.uuid4().hex, message, key, service, job, received - began)
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

    Raises:
        DeadlineExceeded: It was not whole at its deadline: a place is held meanwhile.
    """
    found: list[tuple[NowcastRequest, Key]] = []
    began = asyncio.get_running_loop().time()

    def opened(header: StreamHeader) -> Sink:
        message = read_message(NowcastRequest, header)
        found.append((message, service.catalogue.resolve(message)))
        check_tensors(message.spec, header)
        nbytes = packed_bytes(header.tensors) + spec_bytes(message.spec)
        held.append(service.sessions.reserve(tenant, nbytes, "the nowcast"))
        limit.reschedule(began + (message.deadline or service.settings.default_deadline))
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


async def _answered(request: Request, job: Job[Prediction], seconds: float) -> None:
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


def _let_go(service: Service, held: list[Reservation]) -> None:
    for reservation in held:
        reservation.release()
    service.memory.freed()


def _reply_header(
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


# Sessions


@router.put(
    ROUTE_SESSION,
    tags=["sessions"],
    summary="Create a session, or find it as it was created",
    response_model=SessionState,
    responses={201: {"model": SessionState, "description": "Created."}},
    openapi_extra=_json_body("SessionCreate", examples.SESSION),
)
async def put_session(
    request: Request,
    response: Response,
    service: ServiceOf,
    tenant: TenantOf,
    name: SessionId,
    predictor: Annotated[str | None, Query(description="Whose coverage to answer with.")] = None,
    checkpoint: Annotated[str | None, Query(description="The checkpoint it will use.")] = None,
) -> SessionState:
    """Create a session for one model. The same body again changes nothing; another one is a conflict."""
    service.engine.check_open()
    body = await read_all(request, cap=int(service.settings.max_json), idle=service.settings.upload_idle)
    wanted = read_json(SessionCreate, body)
    service.sessions.check_size(name, wanted)
    fields = PredictionFields.model_construct(predictor=predictor, checkpoint=checkpoint)
    made = await service.predictor(service.catalogue.resolve(fields))
    if predictor or checkpoint:  # else it is not said yet which one will read them
        check_kept(wanted.keep, made.context, f"predictor {made.name}")
    coverage = await service.coverage(tenant, made, wanted.spec)
    session, new = service.sessions.create(tenant, name, wanted)
    service.board.opened(tenant, name, session.spec)
    response.status_code = 201 if new else 200
    return _state(service, session).model_copy(update={"coverage": coverage})


@router.get(ROUTE_SESSION, tags=["sessions"], summary="What the service holds", response_model=SessionState)
async def get_session(service: ServiceOf, tenant: TenantOf, name: SessionId) -> SessionState:
    """Snapshots, nowcasts and bytes of a session."""
    return _state(service, service.sessions.get(tenant, name))


@router.delete(ROUTE_SESSION, tags=["sessions"], summary="Drop a session", status_code=204)
async def delete_session(service: ServiceOf, tenant: TenantOf, name: SessionId) -> Response:
    """Drop a session and all it holds. One that does not exist is as good as dropped."""
    service.sessions.delete(tenant, name)
    service.board.left(tenant, name)
    return Response(status_code=204)


def _state(service: Service, session: Session) -> SessionState:
    return SessionState(
        session=session.name,
        spec_digest=session.spec_digest,
        keep=session.keep,
        snapshots=(
            *(session.snapshots[step].state() for step in sorted(session.snapshots)),
            *(upload.state() for upload in session.uploads.values()),
        ),
        nowcasts=tuple(_status(service, session, n) for n in session.nowcasts.values()),
        bytes_held=session.reservation.nbytes,
        expires_in=max(0.0, service.sessions.expiry - (time.monotonic() - session.touched)),
    )


def _status(service: Service, session: Session, nowcast: Nowcast) -> NowcastStatus:
    name = nowcast.request.nowcast
    return NowcastStatus(
        nowcast=name,
        state=nowcast.job.state,
        location=ROUTE_SESSION_NOWCAST.format(session=session.name, nowcast=name),
        queued_before=service.engine.before(nowcast.job),
    )


# Snapshots


@router.put(
    ROUTE_SNAPSHOT,
    tags=["sessions"],
    summary="Send one snapshot, or the rest of one",
    response_model=SnapshotState,
    responses={201: {"model": SnapshotState, "description": "Complete, and new."}},
    openapi_extra=_STREAM_BODY,
)
async def put_snapshot(
    request: Request,
    response: Response,
    service: ServiceOf,
    tenant: TenantOf,
    name: SessionId,
    step: StepPath,
    offset: Annotated[
        int, Header(alias=HEADER_OFFSET, ge=0, le=2**53 - 1, description="Byte the body begins at; 0 for all of it.")
    ] = 0,
    digest: Annotated[
        str | None, Header(alias=HEADER_DIGEST, pattern=r"^[0-9a-f]{32}$", description="Content digest of the stream.")
    ] = None,
) -> SnapshotState:
    """Take a `snapshot` stream straight into its memory. It counts when it is complete and checked, not before.

    The same content for the same step again changes nothing; other content is a conflict. An upload that broke off
    stands where `GET` says, and goes on from there with `Nowcast-Offset`.
    """
    began = time.monotonic()
    check_media_type(request)
    service.engine.check_open()
    session = service.sessions.get(tenant, name)
    with service.upload(tenant):
        upload = session.open_upload(step, offset, digest, service.settings.limits)
        try:
            await receive_stream(request, upload.decoder, idle=service.settings.upload_idle, count=service.count_in)
        except DeadlineExceeded:  # silence, like a broken connection, leaves an upload that can resume
            raise
        except NowcastError:
            session.uploads.pop(step, None)
            raise
        finally:
            upload.busy = False
            session.touched = time.monotonic()
    if session.dropped:
        raise Expired(f"session {name} was deleted meanwhile", remedy="create it again")
    snapshot, new = session.complete(upload)
    if new:
        service.watched(session, snapshot)
        service.metrics.snapshots.inc()
        service.metrics.stages.labels("input").observe(time.monotonic() - began)
    response.status_code = 201 if new else 200
    return snapshot.state()


@router.get(
    ROUTE_SNAPSHOT, tags=["sessions"], summary="How much of a snapshot has arrived", response_model=SnapshotState
)
async def get_snapshot(service: ServiceOf, tenant: TenantOf, name: SessionId, step: StepPath) -> SnapshotState:
    """Whether a snapshot is missing, partial or complete; `received` is where an upload goes on."""
    session = service.sessions.get(tenant, name)
    if step in session.snapshots:
        return session.snapshots[step].state()
    if step in session.uploads:
        return session.uploads[step].state()
    return SnapshotState(step=step, state="missing")


# Nowcasts of a session


@router.post(
    ROUTE_NOWCASTS,
    tags=["sessions"],
    summary="Ask for a nowcast",
    status_code=202,
    response_model=NowcastStatus,
    openapi_extra=_json_body("NowcastJob", examples.JOB),
)
async def post_nowcast(
    request: Request, response: Response, service: ServiceOf, tenant: TenantOf, name: SessionId
) -> NowcastStatus:
    """Queue a nowcast of snapshots the service holds. The same id and body again changes nothing."""
    body = await read_all(request, cap=int(service.settings.max_json), idle=service.settings.upload_idle)
    question = read_json(NowcastJob, body)
    made = await service.predictor(service.catalogue.resolve(question))
    session = service.sessions.get(tenant, name)
    found = session.earlier(question)
    if found is None:
        found = _begin(service, session, question, made)
    status = _status(service, session, found)
    response.headers["Location"] = status.location
    return status


def _begin(service: Service, session: Session, question: NowcastJob, predictor: Predictor) -> Nowcast:
    service.engine.check_open()
    key = service.catalogue.resolve(question)
    check_horizon(question.k, predictor.farthest)
    check_count(len(question.steps), predictor.context, f"predictor {predictor.name}")
    check_even(question.steps)
    history = session.history(question.steps)
    session.check_turn()
    place = service.engine.admit(session.tenant)
    service.metrics.age.observe(time.monotonic() - history[-1].completed)

    undo: list[tuple[Key, Any]] = []

    def work(check: Check) -> Prediction:
        before = session.states.get(key)
        tensors = [snapshot.tensors for snapshot in history]
        prediction = predict(predictor, session.spec, tensors, question, before, graphs=service.specs, check=check)
        session.states[key] = prediction.state
        undo.append((key, before))
        return prediction

    job = service.submit(place, key, session.spec, work, seconds=question.deadline or service.settings.default_deadline)
    found = Nowcast(question, job_digest(question), job, key, undo)
    session.remember(found)
    return found


@router.get(
    ROUTE_SESSION_NOWCAST,
    tags=["sessions"],
    summary="Fetch a nowcast",
    response_model=NowcastStatus,
    responses={
        200: {"description": "The nowcast, a `nowcast.reply` stream.", "content": _STREAM},
        202: {"model": NowcastStatus, "description": "Not done yet; ask again."},
    },
)
async def get_nowcast(
    request: Request,
    service: ServiceOf,
    tenant: TenantOf,
    name: SessionId,
    nowcast: NowcastId,
    wait: Annotated[
        float, Query(ge=0, le=86_400, allow_inf_nan=False, description="Seconds to wait for it to be done.")
    ] = 0.0,
) -> Response:
    """Stream the answer, or say how far it is. A finished one can be fetched again."""
    session = service.sessions.get(tenant, name)
    found = session.nowcast(nowcast)
    if not found.job.future.done():
        await _answered_or_not(request, found.job, min(wait, service.settings.max_wait))
    session.touched = time.monotonic()
    if not found.job.future.done():
        status = _status(service, session, found)
        return JSONResponse(status.model_dump(mode="json"), status_code=202, headers={"Location": status.location})
    try:
        prediction = found.job.result()
    except NowcastError:
        found.fetched = True
        raise
    reply = _reply_header(nowcast, found.request, found.key, service, found.job)
    reply = reply.model_copy(update={"spec_digest": session.spec_digest, "steps": found.request.steps})

    def done(complete: bool) -> None:
        found.fetched |= complete
        session.touched = time.monotonic()

    encoder = Encoder(reply.KIND, reply, prediction.frames, service.settings.limits)
    return StreamReply(encoder, count=service.count_out, done=done)


async def _answered_or_not(request: Request, job: Job[Prediction], seconds: float) -> None:
    try:
        await _answered(request, job, seconds)
    except DeadlineExceeded:
        return


@router.post(
    ROUTE_VERDICTS,
    tags=["sessions"],
    summary="Say what became of a nowcast",
    response_model=VerdictReply,
    openapi_extra=_json_body("Verdict", examples.VERDICT),
)
async def post_verdict(request: Request, service: ServiceOf, tenant: TenantOf, name: SessionId) -> VerdictReply:
    """Count a nowcast as applied, kept, rejected, rolled back or only shadowed; each once."""
    body = await read_all(request, cap=int(service.settings.max_json), idle=service.settings.upload_idle)
    verdict = read_json(Verdict, body)
    session = service.sessions.get(tenant, name)
    counted = session.judge(verdict)
    if counted:
        service.board.judged(tenant, name, verdict)
        service.metrics.verdicts.labels(verdict.outcome).inc()
    return VerdictReply(nowcast=verdict.nowcast, outcome=verdict.outcome, counted=counted)


# The service itself


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
    return HealthReply(version=version(), checks=await service.readiness())


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
