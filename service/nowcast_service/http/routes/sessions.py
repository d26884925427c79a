"""Sessions: created, filled with snapshots, asked for nowcasts, told what became of them."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from nowcast_proto.errors import DeadlineExceeded, Expired, NowcastError
from nowcast_proto.messages import (
    NowcastJob,
    NowcastStatus,
    PredictionFields,
    SessionCreate,
    SessionState,
    SnapshotState,
    Verdict,
    VerdictReply,
)
from nowcast_proto.stream import Encoder
from nowcast_proto.version import (
    HEADER_DIGEST,
    HEADER_OFFSET,
    ROUTE_NOWCASTS,
    ROUTE_SESSION,
    ROUTE_SESSION_NOWCAST,
    ROUTE_SNAPSHOT,
    ROUTE_VERDICTS,
)

from nowcast_service.http import examples
from nowcast_service.http.bodies import StreamReply, check_media_type, read_model, receive_stream
from nowcast_service.http.routes.common import (
    ERRORS,
    SMALL,
    STREAM,
    STREAM_BODY,
    NowcastId,
    ServiceOf,
    SessionId,
    StepPath,
    TenantOf,
    answered,
    json_body,
    reply_header,
)
from nowcast_service.predictors.base import Predictor, check_count, check_even, check_horizon, check_kept
from nowcast_service.runtime.answer import Prediction, predict
from nowcast_service.runtime.catalogue import Key
from nowcast_service.runtime.device_queue import Check, Job
from nowcast_service.runtime.service import Service
from nowcast_service.runtime.session import Nowcast, Session, job_digest

router = APIRouter(responses=ERRORS)


@router.put(
    ROUTE_SESSION,
    tags=["sessions"],
    summary="Create a session, or find it as it was created",
    response_model=SessionState,
    responses={201: {"model": SessionState, "description": "Created."}},
    openapi_extra=json_body("SessionCreate", examples.SESSION),
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
    wanted = await read_model(request, service, tenant, SessionCreate)
    need = await asyncio.to_thread(service.sessions.check_size, name, wanted)
    fields = PredictionFields.model_construct(predictor=predictor, checkpoint=checkpoint)
    made = await service.predictor(service.catalogue.resolve(fields))
    if predictor or checkpoint:  # else it is not said yet which one will read them
        check_kept(wanted.keep, made.context, f"predictor {made.name}")
    coverage = await service.coverage(tenant, made, wanted.spec)
    session, new = service.sessions.create(tenant, name, wanted, need)
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
    openapi_extra=STREAM_BODY,
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
    openapi_extra=json_body("NowcastJob", examples.JOB),
)
async def post_nowcast(
    request: Request, response: Response, service: ServiceOf, tenant: TenantOf, name: SessionId
) -> NowcastStatus:
    """Queue a nowcast of snapshots the service holds. The same id and body again changes nothing."""
    question = await read_model(request, service, tenant, NowcastJob, cap=SMALL)
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
        session.states.put(key, prediction.state)
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
        200: {"description": "The nowcast, a `nowcast.reply` stream.", "content": STREAM},
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
    reply = reply_header(nowcast, found.request, found.key, service, found.job)
    reply = reply.model_copy(update={"spec_digest": session.spec_digest, "steps": found.request.steps})

    encoder = Encoder(reply.KIND, reply, prediction.frames, service.settings.limits)
    session.sending += 1  # deleted meanwhile, it holds its bytes until the answer is sent

    def done(complete: bool) -> None:
        session.sending -= 1
        found.fetched |= complete
        session.touched = time.monotonic()

    return StreamReply(encoder, count=service.count_out, done=done)


async def _answered_or_not(request: Request, job: Job[Prediction], seconds: float) -> None:
    try:
        await answered(request, job, seconds)
    except DeadlineExceeded:
        return


@router.post(
    ROUTE_VERDICTS,
    tags=["sessions"],
    summary="Say what became of a nowcast",
    response_model=VerdictReply,
    openapi_extra=json_body("Verdict", examples.VERDICT),
)
async def post_verdict(request: Request, service: ServiceOf, tenant: TenantOf, name: SessionId) -> VerdictReply:
    """Count a nowcast as applied, kept, rejected, rolled back or only shadowed; each once."""
    verdict = await read_model(request, service, tenant, Verdict, cap=SMALL)
    session = service.sessions.get(tenant, name)
    counted = session.judge(verdict)
    if counted:
        service.board.judged(tenant, name, verdict)
        service.metrics.verdicts.labels(verdict.outcome).inc()
    return VerdictReply(nowcast=verdict.nowcast, outcome=verdict.outcome, counted=counted)
