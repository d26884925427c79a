"""A short chaos run: every kind of fault at least once."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import chaos

pytestmark = [pytest.mark.socket, pytest.mark.kill, pytest.mark.slow]


def test_trainings_end_as_if_alone_whatever_becomes_of_the_service(tmp_path: Path) -> None:
    found = chaos.run(1.0, 0, tmp_path)
    assert not found.wrong
    assert len(found.trainings) == chaos.TRAININGS
    assert len(found.faults) == 5
    assert all(one["steps"] > 0 for one in found.trainings)
