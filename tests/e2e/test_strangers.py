"""What strangers may send: small versions of `tests.e2e.hostile` and `tests.e2e.sweep`, which measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import hostile, sweep

pytestmark = [pytest.mark.socket, pytest.mark.slow]


def test_hostile_inputs_are_answered_and_leave_nothing(tmp_path: Path) -> None:
    rows = hostile.run(tmp_path, scale=0.005, senders=1, only=":")
    assert len(rows) > 15
    for row in rows:
        (status,) = row.statuses
        assert status[:3] in ("200", "201", "413", "422"), (row.name, status)
        assert row.growth < hostile.GROWTH, row.name
        assert row.health
        assert max(row.nowcasts) < 120.0, row.name
    assert hostile.table(rows).count("\n") == len(rows) + 1


def test_a_sweep_finds_nothing_wrong(tmp_path: Path) -> None:
    found = sweep.run(tmp_path, 400)
    assert not found.wrong
    assert found.statuses.total() > 350


def test_a_sweep_would_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant that is handed another's session, and an answer that never comes."""
    monkeypatch.setattr(sweep, "BOB", sweep.ALICE)
    monkeypatch.setattr(sweep, "PATIENCE", 2.0)
    found = sweep.run(tmp_path, 40)
    assert any("bob was answered 200" in one for one in found.wrong)
