"""Horizon schedule: far ahead early in training, one stride at its end (NiNo paper, section 3.5).

Period i of n looks ``linspace(sqrt(K), 1, n)[i] ** 2`` strides ahead, rounded, with K the farthest horizon.
"""

from __future__ import annotations

FARTHEST = 40


def horizon_schedule(total_steps: int, period: int, *, farthest: int = FARTHEST, power: float = 2.0) -> tuple[int, ...]:
    """Horizon of every period of a training run, in strides.

    Args:
        total_steps: Steps of the whole run.
        period: Steps between nowcasts.
        farthest: Horizon of the first period; the largest the checkpoint was trained for.
        power: Speed of the decay.

    Returns:
        max(1, total_steps // period) horizons; for ten periods 40 33 26 21 16 11 8 5 3 1.

    Raises:
        ValueError: An argument is not positive.
    """
    if total_steps < 1 or period < 1 or farthest < 1 or power <= 0:
        raise ValueError(
            f"total_steps={total_steps}, period={period}, farthest={farthest}, power={power}: all must be positive"
        )
    periods = max(1, total_steps // period)
    start = farthest ** (1 / power)
    stride = (1 - start) / (periods - 1) if periods > 1 else 0.0
    return tuple(round((start + stride * i) ** power) for i in range(periods))


def horizon_at(step: int, schedule: tuple[int, ...], period: int) -> int:
    """Horizon of the nowcast made after ``step`` full training steps, step counted from 0; the last one for ever after.

    Args:
        step: Index of the step, from 0: the first nowcast of a run is at ``period - 1``.
        schedule: As `horizon_schedule` gives it.
        period: Steps between nowcasts.

    Raises:
        ValueError: ``step`` is negative, ``period`` not positive, or the schedule empty.
    """
    if step < 0 or period < 1 or not schedule:
        raise ValueError(f"step={step}, period={period}, {len(schedule)} horizons: cannot be")
    return schedule[min(step // period, len(schedule) - 1)]
