"""All that one service process holds, and the few things that need several parts of it at once."""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nowcast_proto.errors import Busy, NowcastError
from nowcast_proto.messages import CoverageReport
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.trainings import StatusReply

from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.observe import traces
from nowcast_service.observe.metrics import Metrics
from nowcast_service.predictors.base import Predictor
from nowcast_service.predictors.graphs import Needs
from nowcast_service.runtime.answer import Prediction
from nowcast_service.runtime.archive import Archive
from nowcast_service.runtime.budget import Budget, Shares
from nowcast_service.runtime.catalogue import Catalogue, Key
from nowcast_service.runtime.device_queue import Check, Engine, Job, Place
from nowcast_service.runtime.keys import KeyRing
from nowcast_service.runtime.memory import Trimmer, resident
from nowcast_service.runtime.readiness import Readiness
from nowcast_service.runtime.reading import Reader
from nowcast_service.runtime.session import Session, Snapshot
from nowcast_service.runtime.spec_work import SpecWork
from nowcast_service.runtime.store import SessionStore
from nowcast_service.runtime.trainings import Board, movement
from nowcast_service.settings import Settings

log = logging.getLogger(__name__)

_SWEEP_EVERY = 0.25
_SAVE_EVERY = 15.0
_LINGER = 5.0
"""Seconds a drained service waits for finished answers to be fetched."""


@functools.cache
def version() -> str:
    """Version of the installed distribution."""
    return importlib.metadata.version("nowcast-sidecar")


class Service:
    """One service.

    Args:
        settings: How it is set up.

    Raises:
        NowcastError: Keys, checkpoint or predictor of the settings cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.keys = KeyRing.of(settings)
        tenants = self.keys.tenants
        self.budget = Budget(int(settings.budget), tenants)
        self.specs = SpecWork(
            self.budget,
            seconds=settings.spec_seconds,
            memory=int(settings.spec_memory),
            several=tenants > 1,
        )
        self.reader = Reader(self.specs.nursery, seconds=settings.spec_seconds, memory=int(settings.spec_memory))
        self.catalogue = Catalogue.of(settings, self.specs)
        self.memory = Trimmer()
        self.engine = Engine(
            max_jobs=settings.max_queue, max_jobs_per_tenant=settings.max_queue_per_key, tenants=tenants
        )
        self.sessions = SessionStore(
            self.budget,
            tenant_bytes=int(settings.tenant_budget),
            session_bytes=int(settings.session_budget),
            max_sessions=settings.max_sessions,
            max_sessions_per_tenant=settings.max_sessions_per_key,
            expiry=settings.session_expiry,
            evict_after=settings.evict_after,
            lapse_after=settings.upload_idle,
            tenants=tenants,
            results=settings.results_per_session,
            on_drop=self._dropped,
        )
        self.board = Board(settings.max_trainings, settings.max_watchers)
        self.archive = Archive(settings.archive, settings.max_trainings) if settings.archive is not None else None
        for tenant, training in self.archive.load() if self.archive is not None else ():
            self.board.restore(tenant, training)
        self._began = time.monotonic()
        self._measuring: set[asyncio.Task[None]] = set()
        self._uploads = Shares(settings.max_uploads, tenants)
        self.readiness = Readiness(settings, self.engine, self.catalogue, self.specs, self.metrics)
        watch = self.metrics.watch
        watch(self.metrics.queue, lambda: self.engine.waiting)
        watch(self.metrics.running, lambda: float(self.engine.running_for > 0))
        watch(self.metrics.sessions, lambda: len(self.sessions))
        watch(self.metrics.held, lambda: self.budget.used)
        watch(self.metrics.budget, lambda: self.budget.total)

    @property
    def closing(self) -> bool:
        """Whether it has begun to end."""
        return self.engine.draining

    def status(self) -> StatusReply:
        """What an operator asks first."""
        settings, engine = self.settings, self.engine
        return StatusReply(
            version=version(),
            device=self.catalogue.device,
            uptime=time.monotonic() - self._began,
            queue=engine.waiting,
            queue_limit=settings.max_queue,
            running=engine.running_for,
            uploads=self._uploads.used,
            uploads_limit=settings.max_uploads,
            sessions=len(self.sessions),
            sessions_limit=settings.max_sessions,
            held=self.budget.used,
            budget=self.budget.total,
            resident=resident() or 0,
            draining=engine.draining,
        )

    def watched(self, session: Session, snapshot: Snapshot) -> None:
        """A snapshot is whole: show that on the board, and measure beside everything else how far the weights moved."""
        self.board.snapshot(session.tenant, session.name, snapshot.step)
        older = max((step for step in session.snapshots if step < snapshot.step), default=None)
        if older is None or not self.board.has(session.tenant, session.name):
            return
        task = asyncio.create_task(self._measure(session, session.snapshots[older], snapshot))
        self._measuring.add(task)  # a task that nobody holds may be collected before it has run
        task.add_done_callback(self._measuring.discard)

    async def _measure(self, session: Session, older: Snapshot, newer: Snapshot) -> None:
        layers = self.board.get(session.tenant, session.name).layers
        moved = await asyncio.to_thread(movement, older.tensors, newer.tensors, layers)
        self.board.moved(session.tenant, session.name, newer.step, moved)

    def _dropped(self, reason: str) -> None:
        self.metrics.dropped.labels(reason).inc()
        self.memory.freed()

    async def keep_house(self) -> None:
        """Drop sessions that expire and hand back freed memory, as long as the service runs."""
        saved = time.monotonic()
        while True:
            await asyncio.sleep(_SWEEP_EVERY)
            self.engine.expire()
            self.sessions.sweep()
            self.board.sweep()
            if time.monotonic() - saved > _SAVE_EVERY:
                await self.save()
                saved = time.monotonic()
            if self.memory.due and self.engine.idle and not self._uploads.used:
                await asyncio.to_thread(self.memory.run)

    async def save(self) -> None:
        """Write what is new of the trainings to the archive; what cannot be written is said, and lost."""
        if self.archive is None:
            return
        try:
            await asyncio.to_thread(self.archive.save, self.board.unsaved())
        except sqlite3.Error as exc:
            log.warning("the archive %s cannot be written: %s", self.settings.archive, exc)

    @contextmanager
    def upload(self, tenant: str) -> Iterator[None]:
        """A tenant's turn to send a body.

        Raises:
            Busy: As many bodies as allowed are arriving, of this tenant or in all.
        """
        if not self._uploads.take(tenant):
            raise Busy(
                f"{self._uploads.of(tenant)} bodies of this key are arriving already, {self._uploads.used} in all",
                expected=f"at most {self._uploads.most} at once, and {self._uploads.total} in all",
                remedy="try again after Retry-After",
                retry_after=1.0,
            )
        try:
            yield
        finally:
            self._uploads.give(tenant)

    def start(self) -> None:
        """Start the device's thread and the process that works on specs."""
        self.engine.start()
        self.specs.start()

    def stop(self) -> None:
        """End both; does not wait for the device."""
        self.engine.stop()
        self.reader.stop()
        self.specs.stop()

    async def predictor(self, key: Key) -> Predictor:
        """The predictor of a key; a checkpoint is read elsewhere than on the event loop.

        Raises:
            InvalidCheckpoint: The checkpoint is not one, or not for this predictor.
        """
        if self.catalogue.loaded(key):
            return self.catalogue.predictor(key)
        return await asyncio.to_thread(self.catalogue.predictor, key)

    async def coverage(self, tenant: str, predictor: Predictor, spec: ArchitectureSpec) -> CoverageReport | None:
        """What a predictor will do with each parameter; None where it looks at no graph.

        Raises:
            NowcastError: There can be no graph of this spec, or none that is worked out within bounds.
        """
        found = None
        for need in predictor.needs:
            report = await asyncio.wrap_future(self.specs.coverage(tenant, spec, need))
            found = found or (report if need.uncovered else None)
        return found

    async def graph(self, tenant: str, spec: ArchitectureSpec) -> NeuralGraph:
        """The neural graph of a spec, as the default predictor has it where it looks at one.

        Raises:
            NowcastError: There can be none, or none that is worked out within bounds.
        """
        needs = (await self.predictor(self.catalogue.resolve_default())).needs or (Needs(max_features=9),)
        return (await asyncio.wrap_future(self.specs.prepare(tenant, spec, needs[0]))).graph

    def submit(
        self, place: Place, key: Key, spec: ArchitectureSpec, work: Callable[[Check], Prediction], *, seconds: float
    ) -> Job[Prediction]:
        """Queue a nowcast behind what has to be computed of its spec, and count it when it ends.

        Raises:
            Busy: As many specs of this tenant as may wait are waiting.
        """
        label = self.catalogue.predictor(key).name
        at = traces.here()

        # The job comes as an argument: a closure over it would be a cycle, and hold its tensors until it is collected.
        def count(job: Job[Prediction]) -> None:
            self.memory.freed()
            failed = job.state == "failed"
            self.metrics.nowcasts.labels(label, "failed" if failed else "ok").inc()
            if job.started is not None:
                self.metrics.stages.labels("queue").observe(job.started - job.enqueued)
            if not failed:
                prediction = job.result()
                self.metrics.stages.labels("compute").observe(prediction.compute)
                self.metrics.stages.labels("output").observe(prediction.output)
                if job.started is not None:
                    waited = {"queue": job.started - job.enqueued}
                    worked = {"compute": prediction.compute, "output": prediction.output}
                    about: dict[str, str | int] = {"nowcast.predictor": label, "nowcast.parameters": spec.numel}
                    traces.stages(at, time.monotonic(), waited | worked, about)

        try:
            after = self.specs.ahead(place.tenant, self.catalogue.predictor(key).needs, spec)
        except NowcastError:
            place.release()
            raise
        return self.engine.submit(place, work, seconds=seconds, after=after, ended=count)

    def count_in(self, nbytes: int) -> None:
        """Count bytes of a body received."""
        self.metrics.bytes.labels("in").inc(nbytes)

    def count_out(self, nbytes: int) -> None:
        """Count bytes of a body sent."""
        self.metrics.bytes.labels("out").inc(nbytes)

    async def drain(self, seconds: float) -> None:
        """Refuse new work, let what was admitted finish, and its answers be fetched.

        Args:
            seconds: To be done within.
        """
        self.engine.drain()
        end = time.monotonic() + seconds
        while not self.engine.idle and time.monotonic() < end:
            await asyncio.sleep(0.02)
        end = min(end, time.monotonic() + _LINGER)
        while self.sessions.unfetched and time.monotonic() < end:
            await asyncio.sleep(0.02)
        log.info("drained: queue %s", "empty" if self.engine.idle else "not empty in time")
