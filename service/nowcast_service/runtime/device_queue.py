"""Who may use the device, when, and for how long: admission, one worker thread, deadlines, draining. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from nowcast_proto.errors import Busy, DeadlineExceeded, InternalError, NowcastError, Unavailable

from nowcast_service.runtime.budget import Shares
from nowcast_service.runtime.turns import Turns

log = logging.getLogger(__name__)

T = TypeVar("T")
State = Literal["queued", "running", "done", "failed"]
Check = Callable[[], None]
"""What work calls between its parts: it raises when the answer is no longer wanted."""


@dataclass(eq=False)
class Place:
    """The right to put one nowcast on the device; held from admission until the device is done with it."""

    tenant: str
    _release: Callable[[Place], None]
    _held: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def release(self) -> None:
        """Give the place back; safe to call more than once."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            self._release(self)


@dataclass(eq=False)
class Job(Generic[T]):
    """One piece of work for the device.

    Attributes:
        work: Given what to call between its parts, which ends it when nobody wants the answer any more.
        after: What has to be there first; where one of them fails, so does the job.
        future: Resolves to the work's value, or to a `NowcastError`.
        enqueued: When it was queued, on the monotonic clock.
        started: When the device took it up; None before.
    """

    work: Callable[[Check], T] | None
    place: Place
    deadline: float
    ended: Callable[[Job[T]], None]
    after: tuple[Future[Any], ...] = ()
    future: Future[T] = field(default_factory=Future)
    enqueued: float = field(default_factory=time.monotonic)
    started: float | None = None
    unwanted: bool = False

    def check(self) -> None:
        """State that the answer is still wanted.

        Raises:
            DeadlineExceeded: It is not, or comes too late.
        """
        if self.unwanted:
            raise DeadlineExceeded("nobody waits for the nowcast any more", remedy="ask again")
        if time.monotonic() >= self.deadline:
            if self.started is None or self.started >= self.deadline:
                raise DeadlineExceeded(
                    f"the nowcast waited {time.monotonic() - self.enqueued:.1f} s for the device, past its deadline",
                    remedy="give a longer deadline, or come when the queue is shorter",
                )
            raise DeadlineExceeded(
                f"the deadline passed {time.monotonic() - self.started:.1f} s after the nowcast had begun",
                remedy="give a longer deadline, or use a session and fetch the answer later",
            )

    @property
    def ready(self) -> bool:
        """Whether all that has to be there first is there, or has failed."""
        return all(future.done() for future in self.after)

    def result(self) -> T:
        """The work's value, once it is there.

        Raises:
            NowcastError: What the work raised; a fresh copy each time, because a traceback would tie the caller's
                frames, and the tensors in them, to the job.
        """
        exc = self.future.exception()
        if isinstance(exc, NowcastError):
            raise NowcastError.from_body(exc.body(), retry_after=exc.retry_after)
        return self.future.result()

    @property
    def state(self) -> State:
        """Where the job is."""
        if not self.future.done():
            return "queued" if self.started is None else "running"
        if self.future.cancelled() or self.future.exception() is not None:
            return "failed"
        return "done"


class Engine:
    """Runs jobs one at a time on one thread, which is what one device can do; tenants take turns.

    Kernels release the interpreter lock, so the event loop keeps receiving and sending meanwhile. A place is held
    until the job has really ended: a client that goes away, or a deadline that passes, frees a queued place at once, a
    running one at the next moment that the work asks whether it is still wanted.

    Args:
        max_jobs: Places, the running job's included.
        max_jobs_per_tenant: Places one tenant may hold.
        tenants: How many tenants there are; see `Shares`.
    """

    def __init__(self, *, max_jobs: int, max_jobs_per_tenant: int, tenants: int = 1) -> None:
        self._places = Shares(max_jobs, tenants, max_jobs_per_tenant)
        self._queue: Turns[Job[Any]] = Turns()
        self._running: Job[Any] | None = None
        self._ready = threading.Condition()
        self._draining = False
        self._stopped = False
        self._recent: deque[float] = deque(maxlen=16)
        self._thread = threading.Thread(target=self._work, name="nowcast-device", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._thread.start()

    def admit(self, tenant: str) -> Place:
        """Take a place for one job.

        Raises:
            Busy: All places are taken; ``retry_after`` is what recent jobs suggest.
            Unavailable: The engine is draining.
        """
        self.check_open()
        if not self._places.take(tenant):
            mine, total = self._places.of(tenant), self._places.used
            full = total >= self._places.total and mine < self._places.most
            raise Busy(
                f"{total} nowcasts are admitted already" if full else f"this key has {mine} nowcasts admitted already",
                expected=f"at most {self._places.total if full else self._places.most} at once",
                remedy="try again after Retry-After",
                retry_after=self.wait_estimate(),
            )
        return Place(tenant, self._give_back)

    def check_open(self) -> None:
        """State that new work is welcome.

        Raises:
            Unavailable: The engine is draining.
        """
        if self._draining:
            raise Unavailable(
                "the service is shutting down", remedy="try again after Retry-After, elsewhere or here", retry_after=5.0
            )

    def submit(
        self,
        place: Place,
        work: Callable[[Check], T],
        *,
        seconds: float,
        after: tuple[Future[Any], ...] = (),
        ended: Callable[[Job[T]], None] = lambda job: None,
    ) -> Job[T]:
        """Queue work under a place, which the engine gives back when the work has ended.

        Args:
            place: From `admit`.
            work: What to run on the device thread.
            seconds: After which nobody wants the answer any more.
            after: What has to be there before it begins; others go first meanwhile. Cancelled with the job.
            ended: Called with the job when it has ended.
        """
        job: Job[T] = Job(work, place, time.monotonic() + seconds, ended, after)
        with self._ready:
            self._queue.push(place.tenant, job)
            self._ready.notify()
        for future in after:
            future.add_done_callback(self._wake)
        return job

    def abandon(self, job: Job[Any]) -> None:
        """Nobody waits for this job any more: drop it if it has not begun, else end it as soon as it can be."""
        job.unwanted = True
        if self._unqueue(job):
            job.future.cancel()
            self._clear(job)

    def expire(self) -> None:
        """Fail what has waited past its deadline; to be called now and then, as the device may be busy for long."""
        now = time.monotonic()
        with self._ready:
            late = [job for job in self._queue if job.deadline <= now]
        for job in late:
            if self._unqueue(job):
                self._end(job, None, _caught(job.check))

    def _unqueue(self, job: Job[Any]) -> bool:
        with self._ready:
            return self._queue.remove(job.place.tenant, job)

    def _wake(self, _: object) -> None:
        with self._ready:
            self._ready.notify()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

    def before(self, job: Job[Any]) -> int:
        """Jobs that will end before this one begins."""
        with self._ready:
            if job.started is not None or job.future.done():
                return 0
            return self._queue.before(job.place.tenant, job) + (self._running is not None)

    @property
    def running_for(self) -> float:
        """Seconds the current job has been running; 0 when idle."""
        job = self._running
        return 0.0 if job is None or job.started is None else time.monotonic() - job.started

    @property
    def alive(self) -> bool:
        """Whether the worker thread exists."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether new work is refused."""
        return self._draining

    def wait_estimate(self) -> float:
        """Seconds after which a place is likely to be free, 1 to 60."""
        typical = sum(self._recent) / len(self._recent) if self._recent else 1.0
        return min(max(1.0, typical * (len(self._queue) / 2 + 1)), 60.0)

    def drain(self) -> None:
        """Refuse new work from now on; what is queued still runs."""
        with self._ready:
            self._draining = True

    @property
    def idle(self) -> bool:
        """Whether nothing is admitted, queued or running."""
        with self._ready:
            return not self._queue and self._running is None and not self._places.used

    def stop(self) -> None:
        """End the worker once the queue is empty; does not wait for it."""
        with self._ready:
            self._draining = self._stopped = True
            self._ready.notify_all()

    def _give_back(self, place: Place) -> None:
        self._places.give(place.tenant)

    def _next(self) -> Job[Any] | None:
        with self._ready:
            while (job := self._queue.pop(lambda _, waiting: waiting.ready)) is None:
                if self._stopped and not len(self._queue):
                    return None
                self._ready.wait()
            self._running = job
            job.started = time.monotonic()
            return job

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if job.future.set_running_or_notify_cancel():
                self._run(job)
            else:
                self._clear(job)
            # Dropped before the wait for the next one: a finished job's tensors must not outlive it here.
            del job
            self._running = None

    @staticmethod
    def _clear(job: Job[Any]) -> None:
        # What the work closes over, a whole history, must not live as long as the answer.
        job.work = None
        after, job.after = job.after, ()
        for future in after:
            future.cancel()
        job.place.release()

    def _run(self, job: Job[Any]) -> None:
        began = time.monotonic()
        value, error = self._outcome(job)
        self._recent.append(time.monotonic() - began)
        self._end(job, value, error)

    def _end(self, job: Job[Any], value: Any, error: NowcastError | None) -> None:
        # The place is free before the client hears of it: its next question must find it so.
        self._clear(job)
        if error is None:
            job.future.set_result(value)
        else:
            job.future.set_exception(error.with_traceback(None))
        try:
            job.ended(job)
        except Exception:  # whoever watches must not end the worker
            log.exception("counting a nowcast failed")

    @staticmethod
    def _outcome(job: Job[Any]) -> tuple[Any, NowcastError | None]:
        try:
            for future in job.after:
                future.result()
            job.check()
            if job.work is None:
                raise InternalError("the nowcast has run already")
            value = job.work(job.check)
            job.check()
            return value, None
        except NowcastError as exc:
            return None, exc
        except CancelledError:
            return None, Unavailable("the service is shutting down", retry_after=5.0)
        except MemoryError:
            return None, _no_memory()
        except Exception as exc:  # the one place where a bug in a predictor must not end the service
            if type(exc).__name__ == "OutOfMemoryError":  # torch's, for a device
                return None, _no_memory()
            log.exception("a nowcast failed")
            return None, InternalError("the nowcast failed inside the service", remedy="see its log")


def _caught(check: Check) -> NowcastError | None:
    try:
        check()
    except NowcastError as exc:
        return exc
    return None


def _no_memory() -> Unavailable:
    """What is short now may be free at the next nowcast: another process's, or another tenant's, may have taken it."""
    return Unavailable(
        "the memory of the device was short for this nowcast",
        remedy="ask again; where it stays so, lower NOWCAST_ENGINE_MEMORY or use a device with more",
        retry_after=5.0,
    )


async def finished(job: Job[Any], seconds: float) -> bool:
    """Wait until a job has ended; whether it did within this many seconds."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def wake(_: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(event.set)

    job.future.add_done_callback(wake)
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        return job.future.done()
    return True
