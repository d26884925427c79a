"""What the ranks ask each other, one step ahead."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nowcast_proto.rules.verdict import LossTrace, TrialSettings, Verdict, judge
from torch import Tensor

from nowcast_client.ranks.channel import Pending

TAKE, ASK, PATCH = 1, 2, 4
"""What rank 0 may want done at a step: take a snapshot, ask for the nowcast, write one."""


@dataclass(frozen=True)
class Meeting:
    """What the ranks are asked, one step ahead.

    Attributes:
        step: The step after which the answer is carried out.
        flags: What each rank says; the largest of each once they have met.
        first: First step of ``losses``.
        losses: (2, steps) sums and counts of reported losses where a patch is judged; None elsewhere.
        pending: The exchanges.
    """

    step: int
    flags: Tensor
    first: int
    losses: Tensor | None
    pending: tuple[Pending, ...]

    def answer(self) -> list[int]:
        """The flags, once all ranks have met."""
        for pending in self.pending:
            pending.wait()
        return [int(flag) for flag in self.flags.tolist()]

    def verdict(self, patched_at: int, settings: TrialSettings, *, gone: bool) -> Verdict:
        """The judge's, from the same numbers on every rank.

        Args:
            patched_at: Step after which the weights were patched.
            settings: How to decide.
            gone: Whether the loss of a rank has stopped being a number.
        """
        if gone:
            return Verdict(False, "the loss of a rank is not finite", *[math.nan] * 3)
        steps, losses = self.mean_losses()
        old = steps < patched_at
        before, after = (steps[old], losses[old]), (steps[~old], losses[~old])
        return judge(*before, *after, patched_at=patched_at, settings=settings)

    def mean_losses(self) -> tuple[Any, Any]:
        """Steps and mean losses over the ranks that reported any."""
        total, count = self.losses.numpy() if self.losses is not None else np.zeros((2, 0))
        known = count > 0
        return (self.first + np.flatnonzero(known)).astype(np.float64), total[known] / count[known]


def reported(trace: LossTrace, first: int, last: int) -> Tensor:
    """(2, steps) this rank's losses of steps first … last, zero where there is none, and whether there is."""
    rows = torch.zeros((2, last - first + 1), dtype=torch.float64)
    steps, losses = trace.between(first, last)
    places = torch.from_numpy(steps).long() - first
    rows[0, places] = torch.from_numpy(losses)
    rows[1, places] = 1.0
    return rows
