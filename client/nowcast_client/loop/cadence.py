"""When to take a snapshot, and how far ahead to ask for. Pure arithmetic on the count of optimizer steps.

NiNo paper, section 4: five snapshots per period, a nowcast at its end, and a horizon that shrinks with the square of
the training's progress, from 40 strides at the start to 1 at the end; from 20 here, see
`nowcast_client.settings.MAX_HORIZON`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nowcast_proto.rules.horizon import horizon_at, horizon_schedule

from nowcast_client.errors import AttachError
from nowcast_client.settings import MAX_HORIZON

DEFAULT_PERIODS = 10
"""Length of the horizon schedule where the length of the training is not known, as published."""
SHORTEST_PERIOD, LONGEST_PERIOD = 100, 1000
"""Between which the default period lies: at half the shortest nowcasts harmed text in
``docs/results-h32.md``; the longest is the published one."""
MANY_NOWCASTS = 20
"""More in one training is beyond what the shipped weights were refined on (12) and measured to gain with (19 on images;
on text as many harmed); 50 ruined runs in ``docs/results-h32.md`` where all were kept, and gained nothing on trial."""


def default_period(total_steps: int | None, context: int) -> int:
    """Steps between nowcasts where the caller names none.

    In ``docs/results-h32.md`` a tenth of the training did best on text, and a twentieth little better on images; short
    trainings gain from periods far below the published 1,000 steps.

    Args:
        total_steps: Length of the training, None where it is not known.
        context: Snapshots per nowcast; the period is a multiple of it.

    Returns:
        A tenth of the training, at least 100 and at most 1,000 steps; 1,000 for a training of unknown length.
    """
    if total_steps is None:
        return LONGEST_PERIOD
    tenth = min(max(total_steps // DEFAULT_PERIODS, SHORTEST_PERIOD), LONGEST_PERIOD)
    return max(tenth // context, 1) * context if context > 0 else tenth


@dataclass(frozen=True)
class Timetable:
    """Snapshot and nowcast times of one training, in real optimizer steps counted from 1.

    Attributes:
        period: Steps between nowcasts.
        context: Snapshots per nowcast, as many as the checkpoint reads.
        total_steps: Length of the training; without it the schedule spans `DEFAULT_PERIODS` periods and stays at its
            last horizon afterwards.
        max_horizon: First horizon of the schedule, in strides.
    """

    period: int
    context: int = 5
    total_steps: int | None = None
    max_horizon: int = MAX_HORIZON
    schedule: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.period < self.context:
            raise AttachError(
                f"period={self.period} is shorter than its {self.context} snapshots",
                expected=f"a period of at least {self.context} steps",
            )
        if self.total_steps is not None and self.total_steps < 1:
            raise AttachError(f"total_steps={self.total_steps}", expected="a positive number of steps, or None")
        total = DEFAULT_PERIODS * self.period if self.total_steps is None else self.total_steps
        object.__setattr__(self, "schedule", horizon_schedule(total, self.period, farthest=self.max_horizon))

    @property
    def stride(self) -> int:
        """Steps between snapshots."""
        return self.period // self.context

    def snapshot_due(self, step: int) -> bool:
        """Whether a snapshot is taken after this step."""
        return step > 0 and step % self.stride == 0

    def horizon(self, step: int) -> int:
        """Horizon, in strides, of a nowcast asked for after this step."""
        return horizon_at(max(step - 1, 0), self.schedule, self.period)
