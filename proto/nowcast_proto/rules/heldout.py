"""The held-out loss, where a user reports one: no nowcast while it lies above the best it has been.

A training that overfits goes on lowering the loss it trains on, and nowcasts that help with that look good to every
judge of that loss. The held-out loss says otherwise. It comes seldom and nearly free of sampling noise, so single
values are compared: with the lowest so far, allowing for how far they have been seen to scatter about their trend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

MARGIN: Final = 0.005
"""Part of the best held-out loss that the newest may lie above it."""
RECENT: Final = 12
"""Values from which their scatter is told."""
SCATTER: Final = 4.0
"""Standard deviations of it that the newest may lie above the best besides: the lowest of many values lies two to three
below their middle."""


class HeldOut:
    """The held-out losses of a training.

    A loss that is computed while a nowcast is on trial is of weights that still recover. Such losses are compared with
    each other alone: where evaluations come right after nowcasts there are no others.
    """

    def __init__(self) -> None:
        self._series = {"settled": _Series(), "recovering": _Series()}
        self._newest = "settled"

    def add(self, step: int, loss: float, *, recovering: bool = False) -> None:
        """Note the loss on held-out data of the weights after ``step`` steps; several reports for one step (batches of
        an evaluation, several data sets) are averaged."""
        if math.isfinite(loss):
            self._newest = "recovering" if recovering else "settled"
            self._series[self._newest].add(step, loss)

    def objection(self) -> str:
        """Why no nowcast should be made now; empty where nothing speaks against one."""
        newest, settled = self._series[self._newest], self._newest == "settled"
        best = [one.lowest() for one in (self._series.values() if settled else (newest,))]
        if not newest.above(min(best)):
            return ""
        return "the held-out loss is above the best it has been: nowcasts wait until it is back"

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for `load_state_dict`."""
        rows = {name: [list(row) for row in series.recent] for name, series in self._series.items()}
        return {"recent": rows, "best": {n: s.best for n, s in self._series.items()}, "newest": self._newest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another left off; from the beginning where the state is empty."""
        for name, series in self._series.items():
            series.best = state.get("best", {}).get(name)
            series.recent = [[float(number) for number in row] for row in state.get("recent", {}).get(name, ())]
        self._newest = str(state.get("newest", "settled"))


class _Series:
    """Held-out losses that can be compared with each other.

    Attributes:
        best: The lowest so far; None before the first is whole.
        recent: The newest [step, sum, count] of reports, oldest first.
    """

    def __init__(self) -> None:
        self.best: float | None = None
        self.recent: list[list[float]] = []

    def add(self, step: int, loss: float) -> None:
        if self.recent and self.recent[-1][0] == step:
            self.recent[-1][1] += loss
            self.recent[-1][2] += 1
        else:
            self._settle()
            self.recent = [*self.recent[1 - RECENT :], [float(step), loss, 1.0]]

    def lowest(self) -> float:
        """The best, the newest included; infinite where there are none."""
        self._settle()
        return math.inf if self.best is None else self.best

    def above(self, best: float) -> bool:
        """Whether the newest lies above a best one."""
        return bool(self.recent) and self._values()[-1] > best + MARGIN * abs(best) + SCATTER * self._scatter()

    def _values(self) -> list[float]:
        return [total / count for _, total, count in self.recent]

    def _settle(self) -> None:
        """The newest value is whole now."""
        if self.recent:
            newest = self._values()[-1]
            self.best = newest if self.best is None else min(self.best, newest)

    def _scatter(self) -> float:
        """Standard deviation of the values about a smooth path; 0 while there are too few to tell."""
        bends = np.diff(self._values(), 2)
        if bends.size < 6:
            return 0.0
        return float(1.4826 * np.median(np.abs(bends)) / math.sqrt(6.0))
