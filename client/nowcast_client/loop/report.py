"""What is said of a training: counts, events, one line in the log per kind of trouble. A leaf: it decides nothing."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nowcast_proto.errors import (
    InvalidCheckpoint,
    InvalidSpec,
    NowcastError,
    TooLarge,
    UnsupportedArchitecture,
    UnsupportedVersion,
)

from nowcast_client.loop.reports import Reports
from nowcast_client.loop.steps import Steps

log = logging.getLogger("nowcast")
HOPELESS = (InvalidSpec, UnsupportedArchitecture, UnsupportedVersion, TooLarge, InvalidCheckpoint)
"""Answers that trying again in the next period will not change."""


@dataclass(frozen=True)
class Event:
    """Something that happened, for ``on_event``; always called on the trainer's thread.

    Attributes:
        kind: ``snapshot``, ``nowcast`` (arrived), ``patched``, ``shadow``, ``kept``, ``rolled_back``, ``rejected``,
            ``skipped``, ``failed`` or ``off``.
        step: Real optimizer step.
        detail: Particulars.
    """

    kind: str
    step: int
    detail: Mapping[str, Any] = field(default_factory=dict)


class Reporter:
    """Counts, tells, and keeps what goes wrong away from the training.

    Args:
        steps: The steps of the training.
        on_event: Called with every event; None where nobody listens.
        metrics: Called with numbers and the step.
        strict: Raise what goes wrong.
        people: Told of every event; None where nobody watches.

    Attributes:
        counts: How often what happened.
        hook_seconds: Time taken from the trainer.
        wait_seconds: That part of it spent waiting for nowcasts.
        harm_steps: Steps lost to patches that were undone.
    """

    def __init__(
        self,
        steps: Steps,
        on_event: Callable[[Event], object] | None,
        metrics: Callable[[Mapping[str, float], int], object] | None,
        strict: bool,
        people: Reports | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.hook_seconds = self.wait_seconds = 0.0
        self.harm_steps = 0
        self.on_event, self.metrics, self.strict = on_event, metrics, strict
        self.people = people
        self._steps = steps
        self._told: set[str] = set()

    def emit(self, kind: str, **detail: Any) -> None:
        """Tell of an event."""
        step = self._steps.step
        if self.people is not None:
            self.people.event(kind, step, detail)
        if self.on_event is not None:
            with self.guarded("on_event"):
                self.on_event(Event(kind, step, detail))
        if self.metrics is not None and kind != "snapshot":
            numbers = {f"nowcast/{k}": float(v) for k, v in detail.items() if isinstance(v, int | float)}
            numbers[f"nowcast/{kind}"] = 1.0
            numbers["nowcast/hook_seconds"] = self.hook_seconds
            numbers["nowcast/harm_steps"] = float(self.harm_steps)
            with self.guarded("metrics"):
                self.metrics(numbers, step)

    def skip(self, reason: str) -> None:
        """A nowcast was skipped."""
        self.counts[f"skipped: {reason}"] += 1
        self.emit("skipped", reason=reason)
        self.once(f"skipped {reason}", f"a nowcast was skipped: {reason}")

    def failed(self, kind: str, error: Exception) -> str:
        """Something handed to the service failed.

        Returns:
            Why trying again is hopeless; empty where it is not.
        """
        code = error.code if isinstance(error, NowcastError) else type(error).__name__
        if code == "patch_refused":
            self.counts["rejected"] += 1
        self.counts[f"failed: {kind}: {code}"] += 1
        self.emit("rejected" if code == "patch_refused" else "failed", what=kind, code=code, message=str(error))
        self.once(f"{kind} {code}", f"{kind} failed and is skipped: {error}")
        if self.strict:
            raise error
        return f"the service will never accept this: {error}" if isinstance(error, HOPELESS) else ""

    def once(self, key: str, message: str, level: int = logging.WARNING) -> None:
        """Say something the first time; later only to those who debug."""
        log.log(logging.DEBUG if key in self._told else level, "step %d: %s", self._steps.step, message)
        self._told.add(key)

    @contextmanager
    def guarded(self, kind: str) -> Iterator[None]:
        """Let nothing out: what is raised inside is counted, and said once; with ``strict`` it is raised on."""
        try:
            yield
        except Exception as exc:  # whatever it is, the training goes on
            if self.strict:
                raise
            self.counts[f"failed: {kind}: {type(exc).__name__}"] += 1
            key = f"{kind} {type(exc).__name__}"
            if key not in self._told:
                self._told.add(key)
                log.warning("step %d: %s failed and is skipped: %s", self._steps.step, kind, exc, exc_info=exc)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """The trainer's time is taken: it is counted, and nothing that is raised gets out."""
        start = time.perf_counter()
        try:
            with self.guarded(kind):
                yield
        finally:
            self.hook_seconds += time.perf_counter() - start

    def part(self, prefix: str) -> dict[str, int]:
        """Counts whose names begin alike, without that beginning."""
        return {k.removeprefix(prefix): n for k, n in sorted(self.counts.items()) if k.startswith(prefix)}
