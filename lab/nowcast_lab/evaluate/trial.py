"""Nowcasts on trial in an evaluation: the client's own rules on the losses of a training."""

from __future__ import annotations

import copy
from dataclasses import replace

from nowcast_proto.rules.verdict import BestLevel, LossTrace, TrialSettings, judge
from torch import nn

from nowcast_lab.evaluate.optimizers import Optimizers


class OnTrial:
    """Watches a training, undoes nowcasts that do not come back, and says when none should be made.

    Args:
        model: What is trained.
        optimizers: Of the training.
        period: Steps between nowcasts; the window is at most a third of it, as in the client.
        steps: Of the run.

    Attributes:
        best: What the nowcasts have brought so far.
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers, period: int, steps: int) -> None:
        self._model, self._optimizers = model, optimizers
        self._period, self._steps = period, steps
        base = TrialSettings()
        self._settings = replace(base, window=max(1, min(base.window, period // 3)))
        self._trace = LossTrace(2 * (period + base.reference))
        self.best = BestLevel(self._settings, steps // period)
        self._settled_at = 0
        self._patched_at: int | None = None
        self._reference_from = 0
        self._saved: tuple[dict[str, object], list[dict[str, object]]] = ({}, [])

    def observe(self, step: int, loss: float) -> None:
        """Note the loss of the weights after ``step`` steps."""
        self._trace.add(step, loss)

    def objection(self, step: int) -> str:
        """Why no nowcast should be made after ``step`` steps; empty where nothing speaks against one."""
        if self._patched_at is not None:
            return "a nowcast is on trial"
        if step + self._settings.window > self._steps:
            return "the training ends before the nowcast could prove itself"
        first = max(self._settled_at, step - self._period // 2)
        return self.best.objection(step, self._trace.between(first, step - 1)[1])

    def begin(self, step: int) -> None:
        """Remember everything before a nowcast is written."""
        self._patched_at = step
        self._reference_from = max(self._settled_at, step - self._settings.reference)
        self._saved = copy.deepcopy((self._model.state_dict(), self._optimizers.state_dicts()))

    def withdraw(self) -> None:
        """The nowcast could not be made."""
        self._patched_at = None

    def verdict(self, step: int) -> bool | None:
        """Whether the nowcast on trial stays, where that is decided now; one that goes is undone."""
        patched = self._patched_at
        if patched is None or not (step >= patched + self._settings.window or self._trace.lost(patched)):
            return None
        found = judge(
            *self._trace.between(self._reference_from, patched - 1),
            *self._trace.between(patched, step),
            patched_at=patched,
            settings=self._settings,
        )
        self._patched_at, self._settled_at = None, step
        self.best.tried(kept=found.keep)
        if not found.keep:
            self._model.load_state_dict(self._saved[0])
            self._optimizers.load_state_dicts(self._saved[1])
        return found.keep
