"""Cadence and horizons."""

import pytest
from nowcast_client.errors import AttachError
from nowcast_client.loop.cadence import Timetable, default_period


def test_every_nowcast_of_a_training_gets_its_horizon() -> None:
    cadence = Timetable(period=1000, total_steps=10_000, max_horizon=40)
    assert [cadence.horizon(s) for s in range(1000, 10_001, 1000)] == [40, 33, 26, 21, 16, 11, 8, 5, 3, 1]
    assert cadence.horizon(50_000) == 1


def test_without_a_length_ten_periods_are_assumed() -> None:
    assert Timetable(period=100).schedule == (20, 17, 14, 11, 9, 6, 5, 3, 2, 1)


def test_five_snapshots_a_period_the_last_at_its_end() -> None:
    cadence = Timetable(period=1000)
    assert [s for s in range(2001) if cadence.snapshot_due(s)] == list(range(200, 2001, 200))


@pytest.mark.parametrize(
    "wrong",
    [{"period": 4}, {"period": 100, "total_steps": 0}],
)
def test_impossible_cadences_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(AttachError):
        Timetable(**wrong)


@pytest.mark.parametrize(
    ("total_steps", "period"),
    [(None, 1000), (50_000, 1000), (10_000, 1000), (2_000, 200), (1_234, 120), (600, 100), (30, 100)],
)
def test_default_period_is_a_tenth_of_the_training_within_bounds(total_steps: int | None, period: int) -> None:
    assert default_period(total_steps, context=5) == period


def test_default_period_holds_whole_strides_of_any_context() -> None:
    assert all(default_period(777, context) % context == 0 for context in range(2, 60))
