"""One training job's session with the service: create, upload, ask, fetch; torch-free and blocking.

The service is a cache of the history. Whatever it has forgotten (a restart, an eviction, an expiry) it says so, and the
snapshots are sent again from the caller's buffers, which stay untouched until the nowcast has been fetched.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, TypeVar
from urllib.parse import urlencode

from nowcast_proto.errors import (
    ChecksumMismatch,
    Conflict,
    DeadlineExceeded,
    Expired,
    MalformedFrame,
    MissingSnapshots,
    NotFound,
    NowcastError,
    Unavailable,
)
from nowcast_proto.messages import (
    CoverageReport,
    NowcastJob,
    NowcastReplyHeader,
    Outcome,
    SessionCreate,
    SessionState,
    SnapshotHeader,
    SnapshotState,
    Verdict,
    VerdictReply,
    read_message,
)
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Encoder, Header
from nowcast_proto.tensors import Limits, TensorFrame
from nowcast_proto.trainings import Report
from nowcast_proto.version import (
    HEADER_DIGEST,
    HEADER_INSTANCE,
    HEADER_OFFSET,
    HEADER_SESSION,
    JSON_TYPE,
    MEDIA_TYPE,
    ROUTE_NOWCASTS,
    ROUTE_REPORTS,
    ROUTE_SESSION,
    ROUTE_SESSION_NOWCAST,
    ROUTE_SNAPSHOT,
    ROUTE_VERDICTS,
)

from nowcast_client.errors import BadReply, HistoryLost, TransportError
from nowcast_client.wire import traces
from nowcast_client.wire.replies import M, check_reply, missing_steps, parsed, read_stream
from nowcast_client.wire.transport import (
    WRITE_BYTES,
    Reply,
    Request,
    Retry,
    Transport,
    call,
    json_body,
)

log = logging.getLogger("nowcast")
T = TypeVar("T")

Frames = Callable[[], Sequence[TensorFrame]]
"""Gives a snapshot's tensors; called again for every upload of it."""
POLL_SECONDS = 5.0
"""Longest the service is asked to hold a request for a nowcast that is not done."""


def mint() -> str:
    """A new session or nowcast id."""
    return uuid.uuid4().hex


class Instances:
    """Which processes of the service answered; one that answers again after another did shares a balancer with it.

    A restart brings a new instance too, but the old one never comes back.
    """

    def __init__(self) -> None:
        self._seen: list[str] = []
        self._told = False

    def note(self, headers: Mapping[str, str]) -> None:
        """Look at a reply's headers; says once what is wrong."""
        instance = headers.get(HEADER_INSTANCE.lower(), "")[:64]
        if not instance or (self._seen and self._seen[-1] == instance):
            return
        if instance in self._seen and not self._told:
            self._told = True
            log.warning(
                "answers come from more than one instance of the service (%s): a balancer in between asks several in "
                "turn, and each knows only a part of this training's session; let it route by the header %s",
                ", ".join(self._seen[-2:]),
                HEADER_SESSION,
            )
        self._seen = [*self._seen[-15:], instance]


class Session:
    """A session with the service.

    Args:
        transport: Where the service is.
        spec: The network's architecture.
        session_id: An earlier session to take up again; a new one is minted otherwise.
        keep: Snapshots the service should hold.
        timeout: Seconds without progress after which a request is tried again.
        retry: How often it is.
        stop: Set to end everything early.
        limits: Caps on replies.
        predictor: What will predict, as far as chosen here.
        checkpoint: The checkpoint it will use, as far as chosen here.

    Attributes:
        trouble: Why the service could not be reached at the last try; empty where it could.
        coverage: What the predictor will do with each parameter, as the service said when the session was opened.
    """

    def __init__(
        self,
        transport: Transport,
        spec: ArchitectureSpec,
        *,
        session_id: str | None = None,
        keep: int = 6,
        timeout: float = 10.0,
        retry: Retry | None = None,
        stop: threading.Event | None = None,
        limits: Limits | None = None,
        predictor: str | None = None,
        checkpoint: str | None = None,
    ) -> None:
        self.coverage: CoverageReport | None = None
        self.id = session_id or mint()
        self.spec = spec
        self._transport = transport
        self._keep = keep
        self._timeout = timeout
        self._retry = retry or Retry()
        self.stop = stop
        self._limits = limits or Limits()
        chosen = {"predictor": predictor, "checkpoint": checkpoint}
        self._query = urlencode({name: value for name, value in chosen.items() if value is not None})
        self._open = False
        self._answered_by = Instances()
        self._spec_digest = spec.digest()
        self.resent = 0
        self.trouble = ""
        self._reported_as: str | None = None

    # ------------------------------------------------------------------ calls

    def open(self, deadline: float) -> SessionState:
        """Create the session, or find it.

        Args:
            deadline: ``time.monotonic()`` after which to give up; so in every method.

        Raises:
            NowcastError: The service refuses the spec, the key, or one more session; or cannot be reached.
        """
        body = SessionCreate(spec=self.spec, keep=self._keep).model_dump_json(exclude_none=True).encode()
        route = self._route(ROUTE_SESSION) + (f"?{self._query}" if self._query else "")
        state = self._json("PUT", route, body, SessionState, deadline)
        if state.spec_digest != self._spec_digest:
            raise BadReply("the service holds the session with another spec", expected=self._spec_digest)
        self._open = True
        self.coverage = state.coverage or self.coverage
        return state

    def state(self, deadline: float) -> SessionState | None:
        """What the service holds; None where it does not know the session."""
        try:
            return self._json("GET", self._route(ROUTE_SESSION), None, SessionState, deadline)
        except (NotFound, Expired):
            return None

    def take_up(self, session_id: str) -> str | None:
        """Go on with an earlier session; returns the id of the one that was open, of no use any more."""
        left, self.id = self.id, session_id
        self._open = False
        return left if left != session_id else None

    def renew(self) -> None:
        """Go on under a new id; nothing the service holds under the old one is used again."""
        self.id, self._open = mint(), False

    def upload(self, step: int, frames: Frames, deadline: float) -> None:
        """Send one snapshot; a broken upload is resumed where it broke off.

        Raises:
            Conflict: The service holds another snapshot of this step.
            NowcastError: It was refused, or the service cannot be reached in time.
        """
        encoder = Encoder(SnapshotHeader.KIND, SnapshotHeader(step=step), frames(), self._limits)
        for _ in range(3):
            if not self._open:
                self.open(deadline)
            try:
                self._put(step, encoder, deadline)
                return
            except (NotFound, Expired):
                self._open = False
        raise NotFound(f"the service forgets session {self.id} as fast as it is created", remedy="check its quotas")

    def nowcast(
        self, job: NowcastJob, history: Mapping[int, Frames | None], deadline: float
    ) -> tuple[NowcastReplyHeader, list[TensorFrame]]:
        """Ask for a nowcast and wait for it.

        Args:
            job: What to predict from which steps.
            history: Step -> its tensors, or None where only the service has them; sent again where they are missing.
            deadline: As always.

        Raises:
            HistoryLost: Neither side has one of the snapshots.
            NowcastError: Refused, failed, corrupted on every try, or too late.
        """
        left = max(0.001, deadline - time.monotonic())
        body = job.model_copy(update={"deadline": left}).model_dump_json(exclude_none=True).encode()
        lost: list[int] = []
        while True:
            if time.monotonic() >= deadline:
                raise DeadlineExceeded("the nowcast did not come in time")
            try:
                while lost:
                    self._send_again(lost[0], history, deadline)
                    del lost[0]
                if not self._open:
                    self.open(deadline)
                self._post(body, deadline)
                return self._fetch(job, deadline)
            except MissingSnapshots as exc:
                lost = missing_steps(exc, job)
            except (NotFound, Expired):
                self._open = False
                self._pause(deadline)
            except (TransportError, Unavailable) as exc:
                self.trouble = str(exc)
                # The tries of one call are few; a service that restarts takes longer. The deadline bounds this loop.
                self._pause(deadline)

    def _send_again(self, step: int, history: Mapping[int, Frames | None], deadline: float) -> None:
        frames = history.get(step)
        if frames is None:
            raise HistoryLost(f"nobody holds the snapshot of step {step} any more")
        self.upload(step, frames, deadline)
        self.resent += 1

    def verdict(self, nowcast: str, outcome: Outcome, reason: str | None, step: int, deadline: float) -> None:
        """Tell the service what became of a nowcast, for its metrics."""
        verdict = Verdict(nowcast=nowcast, outcome=outcome, reason=reason and reason[:200], step=step)
        self._json("POST", self._route(ROUTE_VERDICTS), verdict.model_dump_json().encode(), VerdictReply, deadline)

    def report(self, report: Report, deadline: float) -> None:
        """Say what the training did, for those who watch it; tried once."""
        if self._reported_as not in (None, self.id):
            report = report.model_copy(update={"continues": self._reported_as})
        body = report.model_dump_json(exclude_none=True).encode()
        route = self._route(ROUTE_REPORTS)
        self._call("POST", route, deadline, lambda reply: reply.text(), body=body, retry=Retry(attempts=1))
        self._reported_as = self.id

    def delete(self, deadline: float, session_id: str | None = None) -> None:
        """Drop the session, or another one of ours, at the service."""
        if session_id is None:
            self._open = False
        self._call("DELETE", self._route(ROUTE_SESSION, session_id), deadline, lambda reply: reply.text())

    # ---------------------------------------------------------------- details

    def _heard(self, headers: Mapping[str, str]) -> None:
        self.trouble = ""
        self._answered_by.note(headers)

    def _pause(self, deadline: float) -> None:
        pause = self._retry.delay(2, NowcastError("a pause"))
        if time.monotonic() + pause >= deadline or (self.stop or threading.Event()).wait(pause):
            raise DeadlineExceeded("the service did not come back in time")

    def _route(self, route: str, session_id: str | None = None, **parts: object) -> str:
        return route.format(session=session_id or self.id, **parts)

    def _call(
        self,
        method: Literal["GET", "PUT", "POST", "DELETE"],
        path: str,
        deadline: float,
        read: Callable[[Reply], T],
        *,
        body: bytes | None = None,
        retry: Retry | None = None,
        timeout: float | None = None,
    ) -> T:
        headers = {HEADER_SESSION: self.id, **traces.headers()}
        make, length = None, 0
        if body is not None:
            headers["Content-Type"] = JSON_TYPE
            make, length = json_body(body)
        return call(
            self._transport,
            Request(method, path, headers, make, length),
            read,
            timeout=timeout or self._timeout,
            deadline=deadline,
            retry=retry or self._retry,
            stop=self.stop,
            note=self._heard,
        )

    def _json(
        self, method: Literal["GET", "PUT", "POST"], path: str, body: bytes | None, model: type[M], deadline: float
    ) -> M:
        return self._call(method, path, deadline, lambda reply: parsed(model, reply), body=body)

    def _put(self, step: int, encoder: Encoder, deadline: float) -> None:
        route = self._route(ROUTE_SNAPSHOT, step=step)
        digest = encoder.header.content_digest()
        start, attempt = 0, 0
        while True:
            attempt += 1
            headers = {HEADER_SESSION: self.id, "Content-Type": MEDIA_TYPE, HEADER_DIGEST: digest, **traces.headers()}
            if start:
                headers[HEADER_OFFSET] = str(start)
            body = partial(encoder.chunks, start, WRITE_BYTES)
            request = Request("PUT", route, headers, body, encoder.content_length - start)
            try:
                state = call(
                    self._transport,
                    request,
                    lambda reply: parsed(SnapshotState, reply),
                    timeout=self._timeout,
                    deadline=deadline,
                    retry=Retry(attempts=1),
                    stop=self.stop,
                    note=self._heard,
                )
            except (TransportError, ChecksumMismatch, MalformedFrame, BadReply) as exc:
                self.trouble = str(exc)
                if attempt >= self._retry.attempts:
                    raise
                self._wait_before(attempt, exc, deadline)
                start = (
                    0
                    if isinstance(exc, ChecksumMismatch | MalformedFrame)
                    else self._received(route, digest, encoder.content_length, deadline)
                )
                if start == encoder.content_length:
                    return
            except Conflict as exc:
                if attempt >= self._retry.attempts:
                    raise
                offset = exc.detail.get("offset")
                if isinstance(offset, int):  # the service has more or less of it than we thought
                    start = offset if 0 <= offset <= encoder.content_length else 0
                    continue
                # Other weights of this step are for the caller to sort out; a broken upload that the service has not
                # noticed yet is over in a moment.
                held = self._snapshot_state(route, deadline)
                if held is None or (held.state == "complete" and held.digest != digest):
                    raise
                if held.state == "complete":
                    return
                self._wait_before(attempt, exc, deadline)
                start = 0
            except NowcastError as exc:
                if exc.retry_after is None or attempt >= self._retry.attempts:
                    raise
                self._wait_before(attempt, exc, deadline)
            else:
                if state.state == "complete" and state.digest in (None, digest):
                    return
                if attempt >= self._retry.attempts:
                    raise BadReply(f"the snapshot of step {step} is {state.state}", expected="complete")
                start = 0

    def _received(self, route: str, digest: str, total: int, deadline: float) -> int:
        """Bytes of this very stream that the service already has; all of them when it is complete."""
        state = self._snapshot_state(route, deadline)
        if state is None or state.digest != digest:
            return 0
        return total if state.state == "complete" else min(max(state.received, 0), total - 1)

    def _snapshot_state(self, route: str, deadline: float) -> SnapshotState | None:
        """What the service has of one snapshot; None where it cannot say."""
        try:
            return self._json("GET", route, None, SnapshotState, deadline)
        except NowcastError:
            return None

    def _wait_before(self, attempt: int, error: NowcastError, deadline: float) -> None:
        pause = self._retry.delay(attempt, error)
        if time.monotonic() + pause >= deadline or (self.stop or threading.Event()).wait(pause):
            raise error

    def _post(self, body: bytes, deadline: float) -> None:
        self._call("POST", self._route(ROUTE_NOWCASTS), deadline, lambda reply: reply.text(), body=body)

    def _fetch(self, job: NowcastJob, deadline: float) -> tuple[NowcastReplyHeader, list[TensorFrame]]:
        expected = [(p.name, p.shape) for p in self.spec.parameters]

        def check(header: Header) -> None:
            check_reply(read_message(NowcastReplyHeader, header), header, job, expected, self._spec_digest)

        while True:
            left = deadline - time.monotonic()
            wait = max(0.0, min(POLL_SECONDS, left / 2))
            route = self._route(ROUTE_SESSION_NOWCAST, nowcast=job.nowcast) + f"?wait={wait:.3f}"
            found = self._call(
                "GET",
                route,
                deadline,
                lambda reply: None if reply.status == 202 else read_stream(reply, check, self._limits),
                timeout=self._timeout + wait,
            )
            if found is not None:
                header, frames = found
                return read_message(NowcastReplyHeader, header), frames
