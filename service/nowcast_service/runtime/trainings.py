"""The trainings on this service as people watch them: losses, what became of nowcasts, movement per layer.

Nothing here is needed to nowcast. Everything is bounded: a training keeps so many means of its loss, events and
movements, the board so many trainings; what is dropped is the oldest ended one, then the longest silent one. Touched
from the event loop only.
"""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from nowcast_proto.errors import Busy, NotFound
from nowcast_proto.messages import Verdict
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.trainings import Movement, Report, Training, TrainingEvent, TrainingRow, TrainingState
from torch import Tensor

POINTS = 10_000
"""Means of the loss kept of one training; twice as many are merged two by two."""
EVENTS = 2_000
MOVEMENTS = 400
LAYERS = 48
"""Tensors whose movement is kept; of larger networks the largest."""
MANY = 4096
"""Tensors the largest are chosen from: this is done on the event loop."""
SAMPLE = 1 << 16
"""Elements of a tensor that its movement is measured on; of larger ones every so many-th."""
RECENT = 48
"""Points of the small picture in the list."""
SPEC_ENTRIES = 50_000
"""Parameters, ranges and blocks of a tenant's specs that are kept for drawings; some 50 MB."""
SILENT_AFTER = 120.0
"""Seconds without a word after which a training is called silent."""
_KINDS = {"applied": "patched"}
"""Outcomes of verdicts whose event has another name."""


class Losses:
    """Means of a training's loss over stretches of equal length, which double when there are too many.

    Args:
        most: Means kept at most, even.
    """

    def __init__(self, most: int = POINTS) -> None:
        self.width = 1
        self.version = 0
        self._most = most
        self.steps = array("q")
        self.means = array("d")
        self._counts = array("q")

    @classmethod
    def of(cls, steps: Sequence[int], means: Sequence[float], width: int) -> Losses:
        """The means of an earlier process."""
        losses = cls()
        losses.width = width
        losses.steps, losses.means = array("q", steps), array("d", means)
        losses._counts = array("q", [width] * len(means))
        return losses

    def __len__(self) -> int:
        return len(self.means)

    def add(self, step: int, loss: float) -> None:
        """Add the loss of one step; steps that go back (a resume) drop what lies after them."""
        if self.steps and step // self.width < self.steps[-1] // self.width:
            self._cut(step)
        if self.steps and step // self.width == self.steps[-1] // self.width:
            count = self._counts[-1] + 1
            self.means[-1] += (loss - self.means[-1]) / count
            self._counts[-1], self.steps[-1] = count, max(step, self.steps[-1])
            return
        self.steps.append(step)
        self.means.append(loss)
        self._counts.append(1)
        if len(self.means) > self._most:
            self._halve()

    def _cut(self, step: int) -> None:
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.means.pop()
            self._counts.pop()
        self.version += 1

    def _halve(self) -> None:
        self.width *= 2
        self.version += 1
        old = list(zip(self.steps, self.means, self._counts, strict=True))
        self.steps, self.means, self._counts = array("q"), array("d"), array("q")
        for step, mean, count in old:
            if self.steps and step // self.width == self.steps[-1] // self.width:
                total = self._counts[-1] + count
                self.means[-1] += (mean - self.means[-1]) * count / total
                self.steps[-1], self._counts[-1] = step, total
            else:
                self.steps.append(step)
                self.means.append(mean)
                self._counts.append(count)


@dataclass(eq=False)
class Watched:
    """One training, as it is watched."""

    tenant: str
    id: str
    spec: ArchitectureSpec | None
    network: str
    parameters: int
    layers: tuple[str, ...]
    started: float = field(default_factory=time.time)
    touched: float = field(default_factory=time.monotonic)
    name: str = ""
    step: int = 0
    total_steps: int | None = None
    period: int | None = None
    mode: str = "on"
    device: str | None = None
    optimizer: str | None = None
    ended: bool = False
    losses: Losses = field(default_factory=Losses)
    events: deque[TrainingEvent] = field(default_factory=lambda: deque(maxlen=EVENTS))
    counted: int = 0
    known: set[tuple[str, int]] = field(default_factory=set)
    reports: bool = False
    shown: TrainingState = "live"
    counts: Counter[str] = field(default_factory=Counter)
    movements: deque[Movement] = field(default_factory=lambda: deque(maxlen=MOVEMENTS))

    @property
    def state(self) -> TrainingState:
        """Whether it lives, as far as is known."""
        if self.ended:
            return "ended"
        return "silent" if time.monotonic() - self.touched > SILENT_AFTER else "live"

    def note(self, event: TrainingEvent) -> None:
        """Keep an event, and count it; once, though it may be told by a verdict and by reports."""
        key = (event.kind, event.step)
        if key in self.known:
            return
        self.known.add(key)
        if len(self.events) == self.events.maxlen:
            self.known.discard((self.events[0].kind, self.events[0].step))
        self.events.append(event)
        self.counted += 1
        self.counts[event.kind] += 1

    def row(self) -> TrainingRow:
        """Its line in the list."""
        means = self.losses.means
        step = max(1, math.ceil(len(means) / RECENT))
        return TrainingRow(
            training=self.id,
            name=self.name or self.id[:8],
            state=self.state,
            network=self.network,
            parameters=self.parameters,
            step=self.step,
            total_steps=self.total_steps,
            period=self.period,
            mode=self.mode,
            device=self.device,
            optimizer=self.optimizer,
            loss=means[-1] if means else None,
            recent=tuple(means[::-step][::-1]),
            last=self.events[-1] if self.events else None,
            counts=dict(self.counts),
            seen=time.monotonic() - self.touched,
            started=self.started,
        )

    def whole(self) -> Training:
        """All of it."""
        return Training(
            **self.row().model_dump(),
            loss_steps=tuple(self.losses.steps),
            losses=tuple(self.losses.means),
            width=self.losses.width,
            events=tuple(self.events),
            layers=self.layers,
            movements=tuple(self.movements),
        )


class Watcher:
    """One who watches; woken when a training of his changed."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.changed: set[str] = set()
        self.wake = asyncio.Event()

    async def next(self, seconds: float) -> set[str]:
        """The trainings that changed since the last call; empty when none did within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self.wake.wait()
        except TimeoutError:
            return set()
        self.wake.clear()
        changed, self.changed = self.changed, set()
        return changed


class Board:
    """All trainings that are watched.

    Args:
        most: Trainings kept at most.
        watchers: Who may watch at once at most.
    """

    def __init__(self, most: int, watchers: int = 64) -> None:
        self._most = most
        self._most_watchers = watchers
        self._trainings: OrderedDict[tuple[str, str], Watched] = OrderedDict()
        self._watchers: set[Watcher] = set()
        self._unsaved: set[tuple[str, str]] = set()

    # -------------------------------------------------------------- what happens

    def opened(self, tenant: str, session: str, spec: ArchitectureSpec) -> None:
        """A session was created, or found again."""
        found = self._trainings.get((tenant, session))
        if found is None or found.spec is None:
            known = Watched(
                tenant,
                session,
                spec,
                spec.family or "traced",
                spec.numel,
                watched_layers(spec),
            )
            if found is not None:
                known.started, known.losses, known.events = found.started, found.losses, found.events
                known.counts, known.counted, known.known = found.counts, found.counted, found.known
                known.movements = found.movements if found.layers == known.layers else known.movements
            self._trainings[tenant, session] = found = known
            self._make_room()
            self._forget_specs()
        self._touch(found)

    def report(self, tenant: str, session: str, report: Report) -> None:
        """A training said what it did.

        Raises:
            NotFound: No such session was ever opened here, or it was too long ago.
        """
        before = self._trainings.pop((tenant, report.continues), None) if report.continues else None
        found = self._get(tenant, session)
        if before is not None and before is not found:
            found.started, found.losses = before.started, before.losses
            found.events.extendleft(reversed(before.events))
            found.counts.update(before.counts)
            found.counted += before.counted
            found.known |= before.known
        for step, loss in zip(report.loss_steps, report.losses, strict=True):
            found.losses.add(step, loss)
        for event in report.events:
            found.note(event)
        found.reports = True
        found.step, found.mode, found.ended = report.step, report.mode, report.ended
        found.name = report.name or found.name
        found.device = report.device or found.device
        found.optimizer = report.optimizer or found.optimizer
        found.period = report.period or found.period
        found.total_steps = report.total_steps or found.total_steps
        self._touch(found)

    def snapshot(self, tenant: str, session: str, step: int) -> None:
        """A snapshot of a training is whole."""
        found = self._trainings.get((tenant, session))
        if found is not None:
            found.step = max(found.step, step)
            self._touch(found)

    def moved(self, tenant: str, session: str, step: int, moved: tuple[float, ...]) -> None:
        """How far the watched tensors of a training moved over the stride that ended at a step."""
        found = self._trainings.get((tenant, session))
        if found is not None and len(moved) == len(found.layers):
            found.movements.append(Movement(step=step, moved=moved))
            self._touch(found)

    def judged(self, tenant: str, session: str, verdict: Verdict) -> None:
        """What became of a nowcast, of a training that reports nothing else about itself."""
        found = self._trainings.get((tenant, session))
        if found is not None and not found.reports:
            step = found.step if verdict.step is None else verdict.step
            found.note(
                TrainingEvent(kind=_KINDS.get(verdict.outcome, verdict.outcome), step=step, reason=verdict.reason)
            )
            self._touch(found)

    def left(self, tenant: str, session: str) -> None:
        """A session was deleted by its owner: the training has ended."""
        found = self._trainings.get((tenant, session))
        if found is not None:
            found.ended = True
            self._touch(found)

    # -------------------------------------------------------------- who looks

    def rows(self, tenant: str) -> tuple[TrainingRow, ...]:
        """The trainings of a tenant, the newest first."""
        return tuple(one.row() for (owner, _), one in reversed(self._trainings.items()) if owner == tenant)

    def get(self, tenant: str, training: str) -> Watched:
        """One training of a tenant.

        Raises:
            NotFound: There is none.
        """
        return self._get(tenant, training)

    def has(self, tenant: str, training: str) -> bool:
        """Whether a training is (still) on the board."""
        return (tenant, training) in self._trainings

    def unsaved(self) -> list[tuple[str, Training]]:
        """Trainings that changed since the last call, each with whose it is."""
        keys, self._unsaved = self._unsaved, set()
        return [(key[0], self._trainings[key].whole()) for key in keys if key in self._trainings]

    def restore(self, tenant: str, old: Training) -> None:
        """Put back a training that an earlier process of this service kept."""
        one = Watched(tenant, old.training, None, old.network, old.parameters, old.layers, started=old.started)
        one.name, one.step, one.mode = old.name, old.step, old.mode
        one.total_steps, one.period, one.device, one.optimizer = old.total_steps, old.period, old.device, old.optimizer
        one.ended = one.reports = True
        one.losses = Losses.of(old.loss_steps, old.losses, old.width)
        one.events.extend(old.events)
        one.known = {(event.kind, event.step) for event in old.events}
        one.counts.update(old.counts)
        one.counted = len(one.events)
        one.movements.extend(old.movements)
        self._trainings[tenant, one.id] = one
        self._make_room()

    def watch(self, tenant: str) -> Watcher:
        """Begin to watch; end it with `unwatch`.

        Raises:
            Busy: As many watch as may.
        """
        if len(self._watchers) >= self._most_watchers:
            raise Busy(
                f"{len(self._watchers)} pages watch already",
                expected=f"at most {self._most_watchers}",
                remedy="close some of them, or raise NOWCAST_MAX_WATCHERS",
                retry_after=5.0,
            )
        watcher = Watcher(tenant)
        self._watchers.add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """End watching."""
        self._watchers.discard(watcher)

    # -------------------------------------------------------------- details

    def _get(self, tenant: str, training: str) -> Watched:
        found = self._trainings.get((tenant, training))
        if found is None:
            raise NotFound(
                f"there is no training {training}", remedy="open the session first, or look at the list of trainings"
            )
        return found

    def sweep(self) -> None:
        """Tell watchers of trainings that have fallen silent."""
        for one in self._trainings.values():
            if one.state != one.shown:
                self._tell(one)

    def _touch(self, one: Watched) -> None:
        one.touched = time.monotonic()
        self._unsaved.add((one.tenant, one.id))
        self._tell(one)

    def _tell(self, one: Watched) -> None:
        one.shown = one.state
        for watcher in self._watchers:
            if watcher.tenant == one.tenant:
                watcher.changed.add(one.id)
                watcher.wake.set()

    def _make_room(self) -> None:
        while len(self._trainings) > self._most:
            key = min(self._trainings, key=lambda key: (not self._trainings[key].ended, self._trainings[key].touched))
            del self._trainings[key]

    def _forget_specs(self) -> None:
        """Keep a tenant's newest specs, as far as they are small in all: they outlive their sessions."""
        left: dict[str, int] = {}
        for found in reversed(self._trainings.values()):
            if found.spec is not None:
                rest = left.get(found.tenant, SPEC_ENTRIES) - found.spec.entries
                if rest < 0:
                    found.spec = None
                else:
                    left[found.tenant] = rest


def watched_layers(spec: ArchitectureSpec) -> tuple[str, ...]:
    """The tensors whose movement is kept: those of two and more axes, the largest where there are many."""
    named = [p for p in spec.parameters if len(p.shape) > 1] or list(spec.parameters)
    largest = {p.name for p in islice(sorted(named[:MANY], key=lambda p: -p.numel), LAYERS)}
    return tuple(p.name for p in named if p.name in largest)


def movement(older: Mapping[str, Tensor], newer: Mapping[str, Tensor], layers: Iterable[str]) -> tuple[float, ...]:
    """How far tensors moved from one snapshot to the next, each against the size of its weights.

    Large tensors are sampled, so that the work is bounded whatever the network. Runs on any thread.

    Args:
        older: Tensors of the older snapshot.
        newer: Tensors of the newer one.
        layers: Names to measure.

    Returns:
        ``norm(newer - older) / norm(newer)`` for each name; 0 where the weights are all zero.
    """

    def one(name: str) -> float:
        new, old = newer[name].reshape(-1), older[name].reshape(-1)
        every = max(1, new.numel() // SAMPLE)
        new, old = new[::every].float(), old[::every].float()
        size = float(torch.linalg.vector_norm(new))
        return float(torch.linalg.vector_norm(new - old)) / size if size else 0.0

    return tuple(one(name) for name in layers)
