"""One training job's session with the service: create, upload, ask, fetch; torch-free and blocking.

The service is a cache of the history. Whatever it has forgotten (a restart, an eviction, an expiry) it says so, and the
snapshots are sent again from the caller's buffers, which stay untouched until the nowcast has been fetched.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar
from urllib.parse import urlencode

from nowcast_proto.errors import (
    DeadlineExceeded,
    Expired,
    MissingSnapshots,
    NotFound,
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
    Verdict,
    VerdictReply,
    read_message,
)
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Encoder, Header
from nowcast_proto.tensors import Limits, TensorFrame
from nowcast_proto.trainings import Report
from nowcast_proto.version import (
    ROUTE_NOWCASTS,
    ROUTE_REPORTS,
    ROUTE_SESSION,
    ROUTE_SESSION_NOWCAST,
    ROUTE_SNAPSHOT,
    ROUTE_VERDICTS,
)

from nowcast_client.errors import BadReply, HistoryLost, TransportError
from nowcast_client.wire.exchange import Exchange
from nowcast_client.wire.replies import M, check_reply, missing_steps, parsed, read_stream
from nowcast_client.wire.snapshot_upload import Upload
from nowcast_client.wire.transport import (
    Reply,
    Retry,
    Transport,
)

T = TypeVar("T")

Frames = Callable[[], Sequence[TensorFrame]]
"""Gives a snapshot's tensors; called again for every upload of it."""
POLL_SECONDS = 5.0
"""Longest the service is asked to hold a request for a nowcast that is not done."""


def mint() -> str:
    """A new session or nowcast id."""
    return uuid.uuid4().hex


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
        self._exchange = Exchange(transport, timeout, retry or Retry(), stop)
        self._keep = keep
        self._limits = limits or Limits()
        chosen = {"predictor": predictor, "checkpoint": checkpoint}
        self._query = urlencode({name: value for name, value in chosen.items() if value is not None})
        self._open = False
        self._spec_digest = spec.digest()
        self.resent = 0
        self._reported_as: str | None = None

    @property
    def trouble(self) -> str:
        """Why the service could not be reached at the last try; empty where it could."""
        return self._exchange.trouble

    def stop_at(self, event: threading.Event | None) -> None:
        """Have an event end everything early from now on."""
        self._exchange.stop = event

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
                Upload(self._exchange, self.id, self._route(ROUTE_SNAPSHOT, step=step), step, encoder, deadline).run()
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
                self._exchange.pause(2, deadline)
            except (TransportError, Unavailable) as exc:
                self._exchange.trouble = str(exc)
                # The tries of one call are few; a service that restarts takes longer. The deadline bounds this loop.
                self._exchange.pause(2, deadline)

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
        return self._exchange.call(self.id, method, path, deadline, read, body=body, retry=retry, timeout=timeout)

    def _json(
        self, method: Literal["GET", "PUT", "POST"], path: str, body: bytes | None, model: type[M], deadline: float
    ) -> M:
        return self._call(method, path, deadline, lambda reply: parsed(model, reply), body=body)

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
                timeout=self._exchange.timeout + wait,
            )
            if found is not None:
                header, frames = found
                return read_message(NowcastReplyHeader, header), frames
