"""The horizon schedule."""

from __future__ import annotations

import pytest
from nowcast_proto.rules.horizon import horizon_at, horizon_schedule


def test_the_published_schedule():
    assert horizon_schedule(10_000, 1000) == (40, 33, 26, 21, 16, 11, 8, 5, 3, 1)
    assert horizon_schedule(10_999, 1000) == horizon_schedule(10_000, 1000)
    assert horizon_schedule(999, 1000) == (40,)
    assert horizon_schedule(2000, 1000, farthest=9) == (9, 1)


def test_horizon_of_a_step():
    schedule = horizon_schedule(3000, 1000)
    assert [horizon_at(step, schedule, 1000) for step in (0, 999, 1000, 2999, 3000, 10**9)] == [
        schedule[i] for i in (0, 0, 1, 2, 2, 2)
    ]


@pytest.mark.parametrize("arguments", [(0, 10), (10, 0), (-1, 10)])
def test_an_impossible_schedule_is_refused(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        horizon_schedule(*arguments)


def test_an_impossible_step_is_refused():
    with pytest.raises(ValueError, match="cannot be"):
        horizon_at(-1, (40,), 1000)
