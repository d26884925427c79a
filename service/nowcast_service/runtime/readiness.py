"""Whether the service gets work done: tried by a real forward pass through the queue."""

from __future__ import annotations

import time

from nowcast_proto.errors import NowcastError, Unavailable

from nowcast_service.observe.metrics import Metrics
from nowcast_service.runtime.answer import PROBE, probe
from nowcast_service.runtime.catalogue import Catalogue
from nowcast_service.runtime.device_queue import Check, Engine, Job, Place, finished
from nowcast_service.runtime.spec_work import SpecWork
from nowcast_service.settings import Settings

_PROBE_EVERY = 5.0


class Readiness:
    """Checks that work gets done.

    Args:
        settings: How long anything may take.
        engine: The queue a forward pass is sent through.
        catalogue: Whose default predictor makes it.
        specs: What computes its graph.
        metrics: Shows the outcome.
    """

    def __init__(
        self, settings: Settings, engine: Engine, catalogue: Catalogue, specs: SpecWork, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._catalogue = catalogue
        self._specs = specs
        self._metrics = metrics
        self._probed: float | None = None
        self._probe: Job[float] | None = None

    async def check(self) -> dict[str, float]:
        """Check that work gets done: a real forward pass went through the queue lately, and nothing is stuck.

        Returns:
            Check -> seconds.

        Raises:
            Unavailable: Not ready, and why.
        """
        try:
            checks = await self._check()
        except NowcastError:
            self._metrics.ready.set(0)
            raise
        self._metrics.ready.set(1)
        return checks

    async def _check(self) -> dict[str, float]:
        self._engine.check_open()
        if not self._engine.alive:
            raise Unavailable("the device worker has ended", remedy="restart the service", retry_after=5.0)
        running = self._engine.running_for
        if running > self._settings.stall_after:
            raise Unavailable(
                f"one nowcast has been running for {running:.0f} s",
                expected=f"at most {self._settings.stall_after:g} s",
                remedy="restart the service if this goes on",
                retry_after=30.0,
            )
        now = time.monotonic()
        busy = running > 0 and self._probe is None
        if self._probed is not None and (busy or now - self._probed < _PROBE_EVERY):
            return {"forward_pass_age": now - self._probed, "running_for": running}
        return {"forward_pass": await self._forward_pass(), "running_for": running}

    async def _forward_pass(self) -> float:
        if self._probe is None or self._probe.future.done():
            key = self._catalogue.resolve_default()

            def work(check: Check) -> float:
                began = time.perf_counter()
                probe(self._catalogue.predictor(key), self._specs, check)
                return time.perf_counter() - began

            # Not under anybody's quota: readiness must be told from busyness.
            self._probe = self._engine.submit(
                Place("", lambda place: None),
                work,
                seconds=self._settings.stall_after,
                after=self._specs.ahead("", self._catalogue.predictor(key).needs, PROBE),
            )
        job = self._probe
        if not await finished(job, self._settings.ready_timeout):
            raise Unavailable(
                f"a forward pass did not come through the queue in {self._settings.ready_timeout:g} s",
                remedy="wait; restart the service if this goes on",
                retry_after=5.0,
            )
        self._probe = None
        try:
            seconds = job.result()
        except NowcastError as exc:
            raise Unavailable(
                f"a forward pass through the queue failed: {exc.code}", remedy="see the service's log", retry_after=5.0
            ) from exc
        self._probed = time.monotonic()
        return seconds
