"""One training as a process of its own, told by the events it writes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nowcast_proto.errors import InternalError

from nowcast_lab.demo.server import clean_environment

Event = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        step: Optimizer steps done.
        seconds: Wall-clock time of the training, measuring left out.
        loss: Smoothed training loss, in the task's unit.
        held_out: Loss on what was never learnt from.
    """

    step: int
    seconds: float
    loss: float
    held_out: float


@dataclass
class Training:
    """One of the demo's trainings, filled as it goes.

    Attributes:
        name: Short name, of its files too.
        label: What people see.
        points: Its measurements.
        nowcasts: What happened to nowcasts: kind, step and particulars of each event.
        report: The hook's own summary.
        seconds: Wall-clock time of the whole training.
        about: What was trained and how: ``about`` and ``unit`` for people, ``steps``, ``rate``.
        killed_at: Step the service was killed at, if it was.
    """

    name: str
    label: str
    points: list[Point] = field(default_factory=list)
    nowcasts: list[Event] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    about: Event = field(default_factory=dict)
    killed_at: int | None = None

    @property
    def final(self) -> float:
        """Held-out loss at the end."""
        return self.points[-1].held_out

    def reached(self, loss: float) -> Point | None:
        """The first measurement at or below a held-out loss."""
        return next((point for point in self.points if point.held_out <= loss), None)

    def take(self, event: Event) -> None:
        """Take in one event of the process."""
        kind = event["event"]
        if kind == "start":
            self.about = {name: value for name, value in event.items() if name != "event"}
        elif kind == "progress":
            self.points.append(Point(**{name: event[name] for name in ("step", "seconds", "loss", "held_out")}))
        elif kind == "nowcast":
            self.nowcasts.append({"kind": event["kind"], "step": event["step"], **event["detail"]})
        elif kind == "end":
            self.seconds = event["seconds"]
            self.report = event["report"]


def run(training: Training, options: dict[str, str], folder: Path, watch: Callable[[Training], object]) -> None:
    """Run one training to its end.

    Args:
        training: Is filled.
        options: Command-line options of ``python -m nowcast_lab.demo.training_job``, without dashes.
        folder: Where its events (``NAME.jsonl``) and its log go.
        watch: Called after every event.

    Raises:
        InternalError: The process failed; the message ends with the last lines of its log.
    """
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    # By name, as a user's job would be started: this package does not import the client.
    command = [sys.executable, "-m", "nowcast_lab.demo.training_job", "--events", *arguments]
    log = folder / f"{training.name}.log"
    ended = False
    with log.open("wb") as errors, (folder / f"{training.name}.jsonl").open("w") as record:
        process = subprocess.Popen(
            command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
        )
        try:
            for line in process.stdout or ():
                record.write(line)
                event = json.loads(line)
                training.take(event)
                ended = ended or event["event"] == "end"
                watch(training)
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
                process.kill()
    if status or not ended:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise InternalError(f"the training {training.name!r} ended with status {status}:\n{tail}")
