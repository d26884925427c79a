"""What people who watch are told of a training: its losses and events, in batches, beside everything else.

The trainer only notes; the uploader's thread makes the message and sends it. What did not arrive is said again with the
next report, as far as the losses are still known; what arrived twice the service keeps once.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nowcast_proto.messages import Step
from nowcast_proto.rules.verdict import Floats, LossTrace
from nowcast_proto.trainings import MAX_EVENTS, Report, TrainingEvent

EVERY = 2.0
"""Seconds between two reports."""
SOON = 100
"""Steps after which a report is due whatever the time: no trace of losses is shorter than this."""
_MOST = 1_000
"""Losses in one report; more are averaged."""
_SHOWN = frozenset(
    {"nowcast", "patched", "shadow", "kept", "rolled_back", "rejected", "skipped", "failed", "off", "control"}
)


@dataclass(frozen=True)
class About:
    """What does not change during a training.

    Attributes:
        name: What people call it; the machine's name and the model's class by default.
        device: Where it runs.
        optimizer: Class of its optimizer.
        period: Steps between nowcasts.
        total_steps: Length of the training, where it is known.
    """

    name: str
    device: str
    optimizer: str
    period: int
    total_steps: int | None

    @classmethod
    def of(cls, model: Any, optimizer: Any, name: str | None, period: int, total_steps: int | None) -> About:
        """Read it off the model and its optimizer."""
        device = next((str(p.device) for p in model.parameters()), "cpu")
        told = name or f"{type(model).__name__} on {socket.gethostname()}"
        return cls(told[:128], device, type(optimizer).__name__[:128], period, total_steps)


@dataclass(frozen=True)
class _UnderWay:
    """A report that was handed over.

    Attributes:
        events: How many events it tells of.
        last: Step of its newest loss.
        arrived: Set once the service has taken it.
    """

    events: int
    last: int
    arrived: threading.Event = field(default_factory=threading.Event)


class Reports:
    """Collects what is new since the last report.

    Args:
        about: What does not change.
        send: Takes a function that makes the report and one that hears that it arrived, both to be called on another
            thread; says whether it will be tried. One at a time is under way.
    """

    def __init__(self, about: About, send: Callable[[Callable[[], Report], Callable[[], None]], bool]) -> None:
        self._about = about
        self._send = send
        self._events: list[tuple[str, int, Mapping[str, Any]]] = []
        self._told = -1
        self._tried = -1
        self._under_way: _UnderWay | None = None
        self._due = 0.0

    def event(self, kind: str, step: int, detail: Mapping[str, Any]) -> None:
        """Note something that happened."""
        if kind in _SHOWN and len(self._events) < MAX_EVENTS:
            self._events.append((kind, step, detail))

    def due(self, now: float, step: int) -> bool:
        """Whether it is time to report, or losses would soon be forgotten; ``now`` in seconds of one clock."""
        return now >= self._due or step - self._tried > SOON

    def tell(self, now: float, step: int, mode: str, trace: LossTrace) -> None:
        """Hand over what is new.

        Args:
            now: As for `due`.
            step: Optimizer steps made; the loss of the newest may still be averaged with others, and waits.
            mode: ``on``, ``shadow`` or ``off``.
            trace: The losses reported so far.
        """
        self._due, self._tried = now + EVERY, step - 1
        self._settle()
        under_way = _UnderWay(len(self._events), step - 1)
        if self._send(self._report(step, step - 1, mode, trace, ended=False), under_way.arrived.set):
            self._under_way = under_way

    def last(self, step: int, mode: str, trace: LossTrace) -> Callable[[], Report]:
        """Makes the last report; arguments as for `tell`."""
        self._settle()
        return self._report(step, step, mode, trace, ended=True)

    def _settle(self) -> None:
        """Forget what is known to have arrived."""
        sent, self._under_way = self._under_way, None
        if sent is not None and sent.arrived.is_set():
            del self._events[: sent.events]
            self._told = sent.last

    def _report(self, step: int, last: int, mode: str, trace: LossTrace, *, ended: bool) -> Callable[[], Report]:
        steps, losses = trace.between(self._told + 1, last)
        events, about = tuple(self._events), self._about

        def make() -> Report:
            ends, means = thinned(steps, losses)
            return Report.model_validate(
                {
                    "step": step,
                    "mode": mode,
                    "name": about.name,
                    "device": about.device,
                    "optimizer": about.optimizer,
                    "period": about.period,
                    "total_steps": about.total_steps,
                    "loss_steps": ends,
                    "losses": means,
                    "events": [_event(*one) for one in events],
                    "ended": ended,
                }
            )

        return make


def _event(kind: str, step: Step, detail: Mapping[str, Any]) -> TrainingEvent:
    reason = detail.get("reason") or detail.get("message")
    horizon = detail.get("k")
    return TrainingEvent(
        kind=kind,
        step=step,
        reason=None if reason is None else str(reason)[:300],
        horizon=horizon if isinstance(horizon, int) else None,
    )


def thinned(steps: Floats, losses: Floats) -> tuple[list[int], list[float]]:
    """Losses that are finite, as means of neighbours where they are many.

    Args:
        steps: (n,) ascending steps.
        losses: (n,) their losses.

    Returns:
        At most `_MOST` steps, each the last of its stretch, and mean losses.
    """
    known = np.isfinite(losses)
    steps, losses = steps[known], losses[known]
    if steps.size <= _MOST:
        return steps.astype(np.int64).tolist(), losses.tolist()
    edges = np.linspace(0, steps.size, _MOST + 1).astype(np.int64)
    sums = np.add.reduceat(losses, edges[:-1]) / np.diff(edges)
    return steps[edges[1:] - 1].astype(np.int64).tolist(), sums.tolist()
