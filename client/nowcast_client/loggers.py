"""Where the numbers go: adapters from ``metrics=`` to the loggers people use, and one line for a terminal.

Each takes the user's own logger object; none of these packages is imported here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

Metrics = Callable[[Mapping[str, float], int], object]
"""What ``attach(metrics=...)`` takes: numbers by name, and the step."""


def to_logging(logger: logging.Logger | None = None, level: int = logging.INFO) -> Metrics:
    """One line per event to the standard library's logging."""
    chosen = logger or logging.getLogger("nowcast.metrics")
    return lambda numbers, step: chosen.log(
        level, "step %d: %s", step, ", ".join(f"{name}={value:.6g}" for name, value in numbers.items())
    )


def to_tensorboard(writer: Any) -> Metrics:
    """Scalars to a ``torch.utils.tensorboard.SummaryWriter``."""

    def take(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return take


EVENTS = frozenset(
    f"nowcast/{kind}"
    for kind in ("nowcast", "patched", "shadow", "kept", "rolled_back", "rejected", "skipped", "failed", "off")
)
"""Numbers that say that something happened; where one row holds several events, they count."""


def together(earlier: Mapping[str, float], later: Mapping[str, float]) -> dict[str, float]:
    """The numbers of two events that share a row: events are counted, of everything else the newest is kept."""
    counts = {name: earlier[name] + later[name] for name in EVENTS & earlier.keys() & later.keys()}
    return {**earlier, **later, **counts}


def is_wandb(run: object) -> bool:
    """Whether an object is a Weights & Biases run, or takes numbers as one does."""
    return hasattr(run, "define_metric") and hasattr(run, "log")


def to_wandb(run: Any) -> Metrics:
    """Metrics to a Weights & Biases run, or the module itself, against an axis of their own.

    A run has one step for everything: it never goes back, a plain ``log`` moves it forward, and what is logged for an
    earlier step is dropped. So the numbers go into the row that is open, with ``commit=False``, and the training loop's
    own calls of ``log`` say when the next row begins. Two events in one row are counted.
    """
    run.define_metric("nowcast/step")
    run.define_metric("nowcast/*", step_metric="nowcast/step")
    row: dict[str, float] = {}
    opened: object = None

    def take(numbers: Mapping[str, float], step: int) -> None:
        nonlocal row, opened
        # The module has a step only through its run.
        now = getattr(getattr(run, "run", None) or run, "step", None)
        row = together(row, numbers) if row and now == opened else dict(numbers)
        opened = now
        run.log({**row, "nowcast/step": step}, commit=False)

    return take


def to_mlflow(mlflow: Any) -> Metrics:
    """Metrics to MLflow: the module, or an object with its ``log_metrics``."""
    return lambda numbers, step: mlflow.log_metrics(dict(numbers), step=step)


def to_all(*targets: Metrics) -> Metrics:
    """To several places at once."""

    def take(numbers: Mapping[str, float], step: int) -> None:
        for target in targets:
            target(numbers, step)

    return take


class ProgressLine:
    """One line that follows the nowcasts, drawn over itself; only where a terminal is there. Use as ``on_event``.

    Args:
        stream: Where to draw; stderr by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._counts: dict[str, int] = {}
        self._width = 0

    def __call__(self, event: Any) -> None:
        """Take an event of the hook."""
        if not self._live:
            return
        self._counts[event.kind] = self._counts.get(event.kind, 0) + 1
        shown = ("patched", "kept", "rolled_back", "rejected", "skipped", "failed")
        parts = [f"{self._counts[kind]} {kind.replace('_', ' ')}" for kind in shown if kind in self._counts]
        line = f"nowcast  step {event.step}  {event.kind.replace('_', ' ')}  ({', '.join(parts) or 'watching'})"
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    def close(self) -> None:
        """Leave the line where it is."""
        if self._live and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def describe(summary: Mapping[str, Any]) -> str:
    """A summary (`Handle.summary`) in a few sentences, for the end of a training."""
    told = [
        f"nowcasting over {summary['steps']} steps: {summary['arrived']} nowcasts of {summary['asked']} asked for",
        f"{summary['patched']} patches, {summary['kept']} kept, {summary['rolled_back']} undone "
        f"({summary['harm_steps']} steps lost to them)",
    ]
    pace = summary["seconds_per_step"]

    def in_time(steps: int) -> str:
        return f"{steps} steps" + (f", {steps * pace - summary['hook_seconds']:.1f} s" if pace else "")

    if summary["steps_saved"] is not None:
        told.append(f"saved {in_time(summary['steps_saved'])} by the losses of an earlier run alone")
    if summary["shadow"]:
        told.append(f"{summary['shadow']} only watched")
    if summary["rejected"]:
        told.append(f"{summary['rejected']} rejected")
    told.append(
        f"{summary['bytes_sent'] / 1e6:.1f} MB sent, {summary['bytes_received'] / 1e6:.1f} MB received, "
        f"{summary['hook_seconds']:.2f} s taken from the trainer"
    )
    for kind in ("skipped", "failed"):
        told += [f"{kind} {count}x: {reason}" for reason, count in summary[kind].items()]
    return "; ".join(told)
