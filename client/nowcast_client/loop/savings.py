"""How many steps the nowcasts saved: measured against a run alone.

A run that was nowcast cannot know what a training alone would have reached; estimates from the loss's own trend were
wrong in sign on recorded pairs of runs.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nowcast_proto.rules.verdict import Floats

from nowcast_client.errors import AttachError

SMOOTHED = 50
"""Steps over which losses are averaged before they are compared with those of a run alone."""


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
