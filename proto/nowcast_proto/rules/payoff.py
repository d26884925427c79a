"""Do the nowcasts of a training pay? Their evidence is summed against the trend, with some left out at random.

A verdict asks which weights are the better ones to go on from, those of before the nowcast or those now; it cannot see
that training alone would have gone on falling. Little may be lost at every nowcast, and all are kept. What tells is the
trend: the levels of the loss, one a period, are taken for a path whose fall slows down or speeds up smoothly, plus the
same step at every nowcast. The step is what a nowcast is worth. Least squares give it and its error from all levels at
once; periods that were chosen at random to go without a nowcast, before anything was known of them, set it apart from
the fall of training alone. The trend within one period alone tells next to nothing: carried on over a period of n
losses its error is seven times that of a level, and what one nowcast is worth is smaller than that.

Nowcasts have to earn their place: the rule stops them where the sum is against them, whether or not it could be chance.
It therefore stops nearly all that make no difference, sooner or later, which costs nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kind = Literal["nowcast", "control", ""]

FIRST: Final = 8
"""Nowcasts that are made before any is left out: a training of ten, the default, is hardly touched."""
OFTEN: Final = 2
"""The same where more than `FEW` are planned: each is worth less then, and harm adds up."""
FEW: Final = 12
"""Nowcasts of a training that may be made before they have shown what they are worth."""
CAREFUL: Final = 0.3
"""Part of the predicted change that is written then, until nowcasts are surely worth something. At a period of 48 steps
whole ones left a language model behind for good after six of them; three tenths did not, and on a convolutional
net brought half as much (`tests/bench/payoff_pairs.py`)."""
SURE: Final = 3.0
"""Standard errors by which the sum must be for nowcasts before they are written whole."""
BLOCK: Final = 4
"""One of so many periods is left out."""
FEWEST: Final = 2
"""Controls before the sum is believed."""
LONGEST: Final = 96
"""Periods that are looked back on: least squares take milliseconds then."""
BEND: Final = 0.3
"""Part of itself by which the fall of the loss, per logarithm of the steps, changes from one period to the next."""


@dataclass(frozen=True)
class Level:
    """Where the loss was over a stretch of steps.

    Attributes:
        mean: Of the losses, without outliers.
        error: Its standard error under the noise of the loss.
    """

    mean: float
    error: float


@dataclass(frozen=True)
class Period:
    """A period that is over.

    Attributes:
        step: The training's, at its end.
        level: Of the loss, at its end.
        error: The level's standard error.
        kind: How it began: with a nowcast, whatever became of it, with one left out as a control, or neither.
    """

    step: int
    level: float
    error: float
    kind: Kind


@dataclass(frozen=True)
class Worth:
    """What a nowcast is worth.

    Attributes:
        gain: Loss that it saves, against the trend of training alone.
        error: The gain's standard error.
    """

    gain: float
    error: float


def worth(periods: Sequence[Period]) -> Worth | None:
    """What a nowcast of a training is worth, from all of its periods together.

    Args:
        periods: (n,) the periods, in order.

    Returns:
        None before there is anything to tell it from: three periods, and among all but the first a nowcast and a
        control.
    """
    periods = periods[-LONGEST:]
    kinds = [one.kind for one in periods[1:]]
    if len(kinds) < 2 or "nowcast" not in kinds or "control" not in kinds:
        return None
    # What waited for a bad loss to come back is no control: such periods have a worth of their own.
    made = np.array([[kind == "nowcast", kind == ""] for kind in kinds], dtype=np.float64)
    levels = np.array([one.level for one in periods])
    errors = np.array([one.error for one in periods])
    # A loss without noise has some all the same: no path is as smooth as that.
    errors = np.maximum(errors, max(np.median(errors) / 3, 1e-6 * np.abs(levels).max(), 1e-12))
    ages = np.log([max(1, one.step) for one in periods])
    gaps = np.maximum(np.diff(ages), 1e-9)
    found = Worth(0.0, 0.0)
    for _ in range(2):  # how much a fall may bend is a part of the fall of training alone, which the first pass tells
        fall = abs(levels[0] - levels[-1] - found.gain * made[:, 0].sum()) / gaps.sum()
        bend = max(BEND * fall, float(np.median(errors)) / gaps.sum())
        found = _fitted(levels, errors, gaps, made, bend)
    return found


def _fitted(levels: Floats, errors: Floats, gaps: Floats, made: Floats, bend: float) -> Worth:
    """One least-squares fit.

    Args:
        levels: (n + 1,) of the loss.
        errors: (n + 1,) their standard errors.
        gaps: (n,) logarithms of the steps between them.
        made: (n, 2) whether the period between began with a nowcast, and whether with neither that nor a control.
        bend: Standard deviation of the change of the fall, per logarithm of the steps, from one period to the next.
    """
    n = gaps.size
    # Unknown are the level at first, the fall in every period, what a nowcast saves, and what waiting does.
    rows = np.zeros((2 * n + 1, n + 3))
    rows[: n + 1, 0] = 1.0
    rows[1 : n + 1, 1 : n + 1] = -np.tril(np.ones((n, n))) * gaps
    rows[1 : n + 1, n + 1 :] = -np.cumsum(made, axis=0)
    rows[: n + 1] /= errors[:, None]
    change = np.arange(n - 1)
    rows[n + 1 + change, 1 + change], rows[n + 1 + change, 2 + change] = -1.0 / bend, 1.0 / bend
    rows[2 * n, n + 2] = 1e-3 / float(errors.min())  # where none has waited
    right = np.concatenate((levels / errors, np.zeros(n)))
    scale = np.linalg.norm(rows, axis=0)
    rows /= scale
    inverse = np.linalg.inv(rows.T @ rows + 1e-12 * np.eye(n + 3))
    gain = (inverse[n + 1] @ (rows.T @ right)) / scale[n + 1]
    return Worth(float(gain), math.sqrt(max(0.0, float(inverse[n + 1, n + 1]))) / float(scale[n + 1]))


class Payoff:
    """Leaves nowcasts out at random, sums up, and says when there should be no more.

    Args:
        planned: Nowcasts that the training has room for; None where its length is not known.

    Attributes:
        periods: Those that are over.
        made: Nowcasts that were on trial.
        scale: Part of the predicted change that the next one should write.
    """

    def __init__(self, planned: int | None = None) -> None:
        self._first = FIRST if planned is None or planned <= FEW else OFTEN
        self.scale = 1.0 if self._first == FIRST else CAREFUL
        self.periods: list[Period] = []
        self.made = 0
        self._candidates = 0
        self._kind: Kind = ""

    def tried(self) -> None:
        """A nowcast was on trial in the period under way, and was kept or undone: both have a price."""
        self.made += 1
        self._kind = "nowcast"

    def over(self, step: int, level: Level) -> None:
        """A period has ended after this step, at this level of the loss."""
        self.periods.append(Period(step, level.mean, level.error, self._kind))
        self._kind = ""

    def objection(self) -> str:
        """Why the period that begins should have no nowcast; ask only where nothing else speaks against one."""
        if sum(one.kind == "control" for one in self.periods[1:]) >= FEWEST:
            found = worth(self.periods)
            if found is not None and found.gain <= 0:
                return "the loss has not been seen to fall faster with nowcasts than without: there are no more"
            if found is not None and self._first == OFTEN:
                self.scale = 1.0 if found.gain > SURE * found.error else CAREFUL
        if self.made < self._first:
            return ""
        block, place = divmod(self._candidates, BLOCK)
        self._candidates += 1
        # The same on every rank and in every run that is resumed, and independent of anything the training does.
        if random.Random(block).randrange(BLOCK) == place:
            self._kind = "control"
            return "left out, to see what the others are worth"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for `load_state_dict`."""
        return {
            "periods": [list(astuple(one)) for one in self.periods],
            "made": self.made,
            "candidates": self._candidates,
            "kind": self._kind,
            "scale": self.scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another left off; from the beginning where the state is empty."""
        self.periods = [Period(*row) for row in state.get("periods", ())]
        self.made, self._candidates = int(state.get("made", 0)), int(state.get("candidates", 0))
        self._kind, self.scale = state.get("kind", ""), float(state.get("scale", self.scale))
