"""The one background thread: hash, encode, send, ask, fetch, check. The trainer hands over jobs and picks up results.

Nothing here touches live parameters. A job that fails becomes a `Failed` result, never an exception in a thread nobody
watches. A snapshot that could not be sent is not lost: the nowcast that needs it finds it missing and sends it again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from nowcast_proto.errors import Conflict, DeadlineExceeded, NowcastError
from nowcast_proto.messages import CoverageReport, NowcastJob, Outcome
from nowcast_proto.tensors import TensorFrame
from nowcast_proto.trainings import Report
from torch import Tensor

from nowcast_client.network import coverage
from nowcast_client.tensors.layout import WIRE_DTYPES, Layout, views
from nowcast_client.tensors.patch import Patch, Verified, verify
from nowcast_client.tensors.snapshot import Ring, Slot, hold_still, movement
from nowcast_client.wire.session import Frames, Session
from nowcast_client.wire.traces import Root
from nowcast_client.wire.worker import Worker

log = logging.getLogger("nowcast")


@dataclass
class Window:
    """The snapshots of one nowcast.

    Attributes:
        slots: Snapshots held here, oldest first.
        remote: Steps only the service holds (after a resume), older than the slots.
        moved: Largest norm of each tensor's change over one stride, as far as known.
        cancelled: Set when nobody wants the nowcast any more.
        trace: Where it belongs in the training's traces.
    """

    slots: list[Slot] = field(default_factory=list)
    remote: tuple[int, ...] = ()
    moved: dict[str, float] = field(default_factory=dict)
    cancelled: threading.Event = field(default_factory=threading.Event)
    trace: Root = field(default_factory=lambda: Root("nowcast.window"))

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of all its snapshots, oldest first."""
        return (*self.remote, *(slot.step for slot in self.slots))


@dataclass(frozen=True)
class Uploaded:
    """A snapshot is complete at the service."""

    step: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Arrived:
    """A nowcast that passed every check."""

    window: Window
    patch: Patch
    found: Verified
    seconds: float
    predictor: str


@dataclass(frozen=True)
class Failed:
    """A job that came to nothing.

    Attributes:
        kind: ``snapshot``, ``nowcast``, ``resume`` or ``verdict``.
        step: Step the job was for.
        error: What it met.
        window: The nowcast's window, given up; None for other jobs.
    """

    kind: str
    step: int
    error: Exception
    window: Window | None = None


Result = Uploaded | Arrived | Failed


class Uploader:
    """Runs jobs one after another in a daemon thread.

    Args:
        session: The session with the service.
        ring: Gets slots back when they are done with.
        upload_seconds: Most seconds for one snapshot.
        nowcast_seconds: Most seconds for one nowcast, lost snapshots included.
        patch_bound: See `nowcast_client.tensors.patch.verify`.

    Attributes:
        layout: What nowcasts are checked against.
        coverage: What the service does with each parameter, once it has said so.
        share: Share of the elements that move under proven symmetries; None where none was tried.
        in_one_piece: Whether a nowcast's tensors are to lie in one stretch of memory, for a broadcast.
    """

    def __init__(
        self,
        session: Session,
        ring: Ring,
        layout: Layout,
        *,
        upload_seconds: float,
        nowcast_seconds: float,
        patch_bound: float,
    ) -> None:
        self.session = session
        self.results: deque[Result] = deque()
        self.arrived = threading.Condition()
        self._ring = ring
        self.layout = layout
        self._upload_seconds = upload_seconds
        self._nowcast_seconds = nowcast_seconds
        self._patch_bound = patch_bound
        self.in_one_piece = False
        self.coverage: CoverageReport | None = None
        self.share: float | None = None
        self._current: Window | None = None
        self._hands = threading.Lock()  # held where a window is dropped, and where a slot of one begins to be read
        self._reading: tuple[Slot, ...] = ()
        self._telling = False
        self._last: Callable[[], Report] | None = None
        self._ending = threading.Event()
        self._worker = Worker("nowcast-uploader", self.arrived, self._done, self._leave_service)

    # ------------------------------------------------- called by the trainer

    def prove(self, share: float | None) -> None:
        """The wiring has been tried on the live network; see ``share``."""
        self.share = share
        if self.coverage is not None and share is not None:
            log.info("of these, %.2f %% of the elements are proven on the live network", 100 * share)

    def snapshot(self, window: Window, slot: Slot) -> None:
        """Send a snapshot. The slot is already in the window."""
        older = window.slots[-2] if len(window.slots) > 1 else None
        self._worker.submit(lambda: self._snapshot(window, slot, older), window.trace.span("snapshot", step=slot.step))

    def ask(self, window: Window, job: NowcastJob) -> None:
        """Ask for the nowcast of a full window."""
        self._worker.submit(
            lambda: self._nowcast(window, job), window.trace.span("ask", step=job.steps[-1], horizon=job.k)
        )

    def open(self) -> None:
        """Open the session, so that the service says what it makes of the network before the first snapshot."""
        self._worker.submit(self._open)

    def take_up(self, session_id: str, window: Window) -> None:
        """Go on with an earlier session; find out whether the service still holds the window's remote steps."""
        left = self.session.take_up(session_id)
        if left is not None:
            self._worker.submit(lambda: self._forget(left))
        if window.remote:
            self._worker.submit(lambda: self._resume(window))

    def drop(self, window: Window) -> None:
        """Nobody wants this window any more; its slots come back as soon as nothing reads them.

        All that are not being sent this moment come back at once: an exchange with a service that hangs may take as
        long as its time-out, and the next window must not wait for it.
        """
        with self._hands:
            window.cancelled.set()
            busy = [slot for slot in window.slots if slot.copied or any(slot is one for one in self._reading)]
            free = [slot for slot in window.slots if not any(slot is one for one in busy)]
            window.slots = busy
        for slot in free:
            self._ring.release(slot)
        self._worker.submit(lambda: self._leave(window))

    def verdict(self, nowcast: str, outcome: Outcome, reason: str | None, step: int) -> None:
        """Tell the service what became of a nowcast."""
        self._worker.submit(lambda: self._verdict(nowcast, outcome, reason, step))

    def tell(self, make: Callable[[], Report], arrived: Callable[[], None]) -> bool:
        """Make a report and send it, for those who watch; whether it will be tried. One at a time is under way.

        Args:
            make: Makes the report; called in the thread.
            arrived: Called in the thread once the service has taken it.
        """
        if self._telling or self._worker.closing:
            return False
        self._telling = True
        self._worker.submit(lambda: self._tell(make, arrived))
        return True

    def answered(self, window: Window) -> bool:
        """Whether the answer to a window's nowcast, or its failure, waits among the results."""
        return any(getattr(result, "window", None) is window for result in list(self.results))

    def idle(self, timeout: float) -> bool:
        """Wait until no job is left; returns whether that is so."""
        return self._worker.idle(timeout)

    def close(self, timeout: float, last: Callable[[], Report] | None = None) -> bool:
        """Give up what runs, say goodbye to the service, end the thread.

        Args:
            timeout: Seconds it may take.
            last: Makes the last report.

        Returns:
            Whether the thread ended within ``timeout`` seconds; it is a daemon and holds up nothing otherwise.
        """
        self._last = last
        self._worker.refuse()
        self._ending.set()
        current = self._current
        if current is not None:
            current.cancelled.set()
        return self._worker.end(timeout)

    # ------------------------------------------------------- in the thread

    def _done(self) -> None:
        with self._hands:
            self._reading = ()

    def _leave_service(self) -> None:
        try:
            self.session.stop_at(None)
            if self._last is not None:
                self.session.report(self._last(), time.monotonic() + 5.0)  # nobody waits longer than `close` says
            self.session.delete(time.monotonic() + 5.0)
        except Exception as exc:  # the service forgets idle sessions by itself
            log.debug("the session was not deleted: %s", exc)

    def _report(self, result: Result) -> None:
        with self.arrived:
            self.results.append(result)
            self.arrived.notify_all()

    def _begin(self, window: Window) -> None:
        self._current = window
        self.session.stop_at(window.cancelled)
        if self._worker.closing:
            window.cancelled.set()

    def _snapshot(self, window: Window, slot: Slot, older: Slot | None) -> None:
        if window.cancelled.is_set():
            return
        self._begin(window)
        start = time.monotonic()
        try:
            frames = self._frames(window, slot, *([older] if older is not None else []))
            if older is not None:
                for name, norm in movement(older, slot).items():
                    window.moved[name] = max(norm, window.moved.get(name, 0.0))
                self._frames(window, slot)  # the older one is done with
            try:
                self.session.upload(slot.step, lambda: frames, start + self._upload_seconds)
            except Conflict:
                # The service knows other weights of this step: those of a run this one was resumed over.
                self.session.renew()
                self.session.upload(slot.step, lambda: frames, start + self._upload_seconds)
        except Exception as exc:
            if not window.cancelled.is_set():
                self._report(Failed("snapshot", slot.step, exc))
        else:
            self._report(Uploaded(slot.step, sum(len(f.view()) for f in frames), time.monotonic() - start))

    def _nowcast(self, window: Window, job: NowcastJob) -> None:
        step = job.steps[-1]
        if window.cancelled.is_set():
            return
        self._begin(window)
        start = time.monotonic()
        try:
            history: dict[int, Frames | None] = dict.fromkeys(window.remote)
            slots = list(window.slots)
            history |= {slot.step: partial(self._frames, window, slot) for slot in slots}
            header, frames = self.session.nowcast(job, history, start + self._nowcast_seconds)
            deltas = {f.name: tensor_of(f.view(), f.dtype, f.shape) for f in frames}
            deltas = hold_still(deltas, slots)
            newest = slots[-1].buffers
            found = verify(deltas, self.layout, newest, window.moved, job.k, self._patch_bound)
            deltas = found.deltas
            flat = None
            if self.in_one_piece:
                flat = torch.cat([deltas[name].view(-1) for name in self.layout.parameters])
                deltas = views(flat, self.layout)
            patch = Patch(job.nowcast, step, job.k, deltas, flat)
        except Exception as exc:
            self._release(window)
            if not window.cancelled.is_set():
                self._report(Failed("nowcast", step, exc, window))
        else:
            self._release(window)
            self._note(header.coverage)
            self._report(Arrived(window, patch, found, time.monotonic() - start, header.predictor))

    def _open(self) -> None:
        self.session.stop_at(self._ending)
        try:
            self._note(self.session.open(time.monotonic() + self._upload_seconds).coverage)
        except NowcastError as exc:  # the first snapshot opens it, or says why not
            log.debug("the session was not opened at attach: %s", exc)

    def _forget(self, session_id: str) -> None:
        self.session.stop_at(self._ending)
        try:
            self.session.delete(time.monotonic() + 2.0, session_id)
        except NowcastError as exc:  # the service forgets idle sessions by itself
            log.debug("session %s was not deleted: %s", session_id, exc)

    def _note(self, report: CoverageReport | None) -> None:
        """Show once what the service does with each parameter."""
        if report is not None and self.coverage is None:
            log.info("%s", coverage.lines(report, self.session.spec.kind, self.share))
        self.coverage = report or self.coverage

    def _resume(self, window: Window) -> None:
        self._begin(window)
        step = window.remote[-1]
        try:
            state = self.session.state(time.monotonic() + self._upload_seconds)
            held = {s.step for s in state.snapshots if s.state == "complete"} if state else set()
            if not held.issuperset(window.remote):
                raise NowcastError("the service no longer holds the window this training was saved in")
        except Exception as exc:
            self._report(Failed("resume", step, exc, window))

    def _verdict(self, nowcast: str, outcome: Outcome, reason: str | None, step: int) -> None:
        self.session.stop_at(None)
        try:
            self.session.verdict(nowcast, outcome, reason, step, time.monotonic() + 2.0)
        except Exception as exc:
            self._report(Failed("verdict", step, exc))

    def _tell(self, make: Callable[[], Report], arrived: Callable[[], None]) -> None:
        self.session.stop_at(self._ending)
        try:
            self.session.report(make(), time.monotonic() + 2.0)
            arrived()
        except Exception as exc:  # nobody's training depends on being watched, whatever went wrong
            log.debug("a report was not taken: %s", exc)
        finally:
            self._telling = False

    def _frames(self, window: Window, slot: Slot, *others: Slot) -> Sequence[TensorFrame]:
        """A slot's frames; until the job ends or asks for other ones, nobody else gets the slots.

        Raises:
            DeadlineExceeded: The window has been dropped meanwhile.
        """
        with self._hands:
            if window.cancelled.is_set():
                raise DeadlineExceeded("nobody wants this snapshot any more")
            self._reading = (slot, *others)
        return slot.encode()

    def _leave(self, window: Window) -> None:
        self._release(window)
        window.trace.end()

    def _release(self, window: Window) -> None:
        with self._hands:
            slots, window.slots = window.slots, []
        for slot in slots:
            with suppress(NowcastError):
                slot.wait()  # nothing may still be arriving in memory that is used again
            self._ring.release(slot)


def tensor_of(data: memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor over received bytes, without a copy."""
    return torch.frombuffer(data, dtype=WIRE_DTYPES[dtype]).reshape(shape)
