"""How many steps the nowcasts saved: an estimate from the loss's own trend, or a measurement against a run alone.

A run that was nowcast cannot know what a training alone would have reached. What it can say: how fast the loss fell in
the half period before a nowcast, how fast it falls after the recovery, and by how much it is lower. A training alone
would have gone through that drop at a speed between the two; their logarithmic mean is the right one for a straight
line and for an exponential decay. Where the loss shows no fall beyond its noise there is no estimate, and none is
longer than a period. On steep beginnings, whose fall slows down within the half period, it errs on the low side.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nowcast_proto.rules.verdict import Floats, noise, slope

from nowcast_client.errors import AttachError

SMOOTHED = 50
"""Steps over which losses are averaged before they are compared with those of a run alone."""
FEWEST = 20
"""Losses that a trend is read from at least."""


def ahead(before_steps: Floats, before: Floats, after_steps: Floats, after: Floats) -> float | None:
    """Estimate how many steps a nowcast that was kept put the training ahead.

    Args:
        before_steps: (n,) steps of the losses from before the nowcast.
        before: (n,) those losses.
        after_steps: (m,) steps of the losses after the recovery.
        after: (m,) those losses.

    Returns:
        Steps, negative where the loss is behind; None where it had no trend beyond its noise, or too few were reported.
    """
    before_steps, before = _finite(before_steps, before)
    after_steps, after = _finite(after_steps, after)
    if min(before.size, after.size) < FEWEST:
        return None
    old, doubt = slope(before_steps, before, noise(before))
    new, new_doubt = slope(after_steps, after, noise(after))
    if old >= -3.0 * doubt:
        return None
    left = before.mean() + old * (before_steps[-1] - before_steps.mean())
    found = after.mean() + new * (after_steps[0] - after_steps.mean())
    speed = -old
    if new < -3.0 * new_doubt and abs(new / old - 1.0) > 1e-3:
        speed = (new - old) / math.log(old / new)
    longest = 2.0 * before.size
    return float(np.clip((left - found) / speed - (after_steps[0] - before_steps[-1]), -longest, longest))


def _finite(steps: Floats, losses: Floats) -> tuple[Floats, Floats]:
    sane = np.isfinite(losses)
    return steps[sane], losses[sane]


class Baseline:
    """The losses of an earlier run without nowcasts, to measure this one against.

    Args:
        losses: One per optimizer step from the first on; or the path of a JSON list of them, or of a CSV file whose
            last column they are.

    Raises:
        AttachError: There are none, or they cannot be read.
    """

    def __init__(self, losses: Sequence[float] | str | Path) -> None:
        try:
            given = _read(Path(losses)) if isinstance(losses, str | Path) else losses
            values = np.array(given, dtype=np.float64)
        except (OSError, TypeError, ValueError) as exc:
            raise AttachError(
                f"the baseline cannot be read: {exc}",
                expected="losses, one per step: a list, a JSON list in a file, or the last column of a CSV file",
            ) from exc
        if values.ndim != 1 or values.size < SMOOTHED:
            raise AttachError(f"a baseline of {values.size} losses", expected=f"at least {SMOOTHED}, one per step")
        self.steps = values.size
        self._levels = np.convolve(values, np.full(SMOOTHED, 1.0 / SMOOTHED), mode="valid")

    def saved(self, steps: Floats, losses: Floats) -> int | None:
        """Steps by which this run is ahead at the level of its newest losses.

        Args:
            steps: (n,) steps of the newest losses.
            losses: (n,) those losses; the last `SMOOTHED` count.

        Returns:
            Steps, negative where it is behind; None where there are too few losses, or the run alone never got there.
        """
        recent = losses[-SMOOTHED:][np.isfinite(losses[-SMOOTHED:])]
        if recent.size < SMOOTHED:
            return None
        reached = np.flatnonzero(self._levels <= recent.mean())
        # Level i is the mean of steps i + 1 … i + SMOOTHED; loss number n is of the weights after n - 1 steps.
        return int(reached[0] + SMOOTHED - 1 - steps[-1]) if reached.size else None


def _read(path: Path) -> list[float]:
    with path.open(newline="") as file:
        if path.suffix == ".json":
            return [float(loss) for loss in json.load(file)]
        rows = [row for row in csv.reader(file) if row]
    return [float(row[-1]) for row in rows[0 if _is_number(rows[0][-1]) else 1 :]] if rows else []


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
