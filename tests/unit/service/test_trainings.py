"""What is kept of trainings for people who watch: bounded, in order, and apart from other tenants'."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch
from nowcast_proto.errors import Busy, NotFound, UnreadableFile
from nowcast_proto.messages import Verdict
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.trainings import Report, TrainingEvent
from nowcast_service.runtime import trainings
from nowcast_service.runtime.archive import Archive
from nowcast_service.runtime.trainings import LAYERS, SILENT_AFTER, Board, Losses, movement, watched_layers

SPEC = ArchitectureSpec.model_validate(
    {"family": "sequential", "parameters": [{"name": "0.weight", "shape": [4, 2]}, {"name": "0.bias", "shape": [4]}]}
)


def board(most: int = 8) -> Board:
    made = Board(most, watchers=1)
    made.opened("ann", "run", SPEC)
    return made


def test_means_are_merged_and_stay_means() -> None:
    losses = Losses(most=8)
    for step in range(1, 65):
        losses.add(step, float(step))
    assert len(losses) <= 8
    assert losses.width == 16
    ends = list(losses.steps)
    assert ends[-1] == 64
    # Every mean is that of the steps of its stretch: of the integers a … b it is (a + b) / 2.
    firsts = [max(1, end // 16 * 16) for end in ends]
    assert list(losses.means) == pytest.approx([(a + b) / 2 for a, b in zip(firsts, ends, strict=True)])


def test_a_training_that_goes_back_drops_what_lay_ahead() -> None:
    losses = Losses()
    for step in (1, 2, 3, 4):
        losses.add(step, float(step))
    before = losses.version
    losses.add(2, 9.0)
    assert (list(losses.steps), list(losses.means)) == ([1, 2], [1.0, 9.0])
    assert losses.version > before


def test_reports_are_shown_and_tenants_apart() -> None:
    made = board()
    event = TrainingEvent(kind="patched", step=2, horizon=5)
    made.report("ann", "run", Report(step=3, name="digits", loss_steps=(1, 2), losses=(2.0, 1.0), events=(event,)))
    (row,) = made.rows("ann")
    assert (row.name, row.step, row.loss, row.counts, row.last) == ("digits", 3, 1.0, {"patched": 1}, event)
    assert made.rows("ben") == ()
    with pytest.raises(NotFound):
        made.get("ben", "run")
    with pytest.raises(NotFound):
        made.report("ben", "run", Report(step=1))


def test_a_training_that_goes_on_in_another_session_is_one() -> None:
    made = board()
    made.report("ann", "run", Report(step=2, loss_steps=(1, 2), losses=(2.0, 1.0)))
    made.opened("ann", "second", SPEC)
    made.report("ann", "second", Report(step=3, loss_steps=(3,), losses=(0.5,), continues="run"))
    (row,) = made.rows("ann")
    assert row.training == "second"
    assert made.get("ann", "second").whole().losses == (2.0, 1.0, 0.5)


def test_verdicts_stand_in_where_nothing_is_reported() -> None:
    made = board()
    made.judged("ann", "run", Verdict(nowcast="n", outcome="applied", step=7))
    assert made.rows("ann")[0].counts == {"patched": 1}
    made.report("ann", "run", Report(step=8))
    made.judged("ann", "run", Verdict(nowcast="n", outcome="kept", step=9))
    assert made.rows("ann")[0].counts == {"patched": 1}


def test_an_event_told_twice_is_one() -> None:
    """By a verdict and a report, or by a report that was repeated since its answer was lost."""
    made = board()
    made.judged("ann", "run", Verdict(nowcast="n", outcome="applied", step=7))
    events = (TrainingEvent(kind="patched", step=7, horizon=5), TrainingEvent(kind="kept", step=9))
    for _ in range(2):
        made.report("ann", "run", Report(step=9, loss_steps=(8, 9), losses=(2.0, 1.0), events=events))
    whole = made.get("ann", "run").whole()
    assert whole.counts == {"patched": 1, "kept": 1}
    assert len(whole.events) == 2
    assert whole.losses == (2.0, 1.0)


def test_room_is_made_of_ended_trainings_first() -> None:
    made = board(most=2)
    made.opened("ann", "second", SPEC)
    made.left("ann", "second")
    made.opened("ann", "third", SPEC)
    assert {row.training for row in made.rows("ann")} == {"run", "third"}


def test_watchers_are_bounded_and_hear_their_own() -> None:
    made = board()
    made.opened("ben", "other", SPEC)
    watcher = made.watch("ben")
    with pytest.raises(Busy):
        made.watch("ann")
    made.left("ann", "run")
    assert not watcher.changed
    made.left("ben", "other")
    assert watcher.changed == {"other"}
    made.unwatch(watcher)
    made.watch("ann")


def test_silence_is_told() -> None:
    made = board()
    watcher = made.watch("ann")
    made.sweep()
    assert not watcher.changed
    made.get("ann", "run").touched -= 2 * SILENT_AFTER
    made.sweep()
    assert watcher.changed == {"run"}
    assert made.rows("ann")[0].state == "silent"


def test_movement_of_large_tensors_is_sampled() -> None:
    old = {"a": torch.ones(1 << 20), "b": torch.zeros(4), "c": torch.ones(4, dtype=torch.bfloat16)}
    new = {"a": torch.full((1 << 20,), 2.0), "b": torch.zeros(4), "c": torch.ones(4, dtype=torch.bfloat16)}
    assert movement(old, new, ("a", "b", "c")) == pytest.approx((0.5, 0.0, 0.0))


def test_layers_that_are_watched_are_few() -> None:
    parameters = [{"name": f"{i}.weight", "shape": [i + 1, 2]} for i in range(100)] + [{"name": "x.bias", "shape": [9]}]
    spec = ArchitectureSpec.model_validate({"family": "sequential", "parameters": parameters})
    assert watched_layers(spec) == tuple(f"{i}.weight" for i in range(100 - LAYERS, 100))


def test_archive_keeps_the_newest(tmp_path: Path) -> None:
    made = board()
    made.report("ann", "run", Report(step=2, name="digits", loss_steps=(1, 2), losses=(2.0, 1.0)))
    archive = Archive(tmp_path / "trainings.db", most=1)
    archive.save(made.unsaved())
    assert made.unsaved() == []
    fresh = Board(8)
    for tenant, training in Archive(tmp_path / "trainings.db", most=1).load():
        fresh.restore(tenant, training)
    (row,) = fresh.rows("ann")
    assert (row.name, row.state, row.step, row.loss) == ("digits", "ended", 2, 1.0)
    made.opened("ann", "later", SPEC)
    archive.save([("ann", made.get("ann", "later").whole())])
    assert [training.training for _, training in archive.load()] == ["later"]


def test_archive_refuses_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is not SQLite, and long enough to be read as a header of one " * 20)
    with pytest.raises(UnreadableFile, match="NOWCAST_ARCHIVE"):
        Archive(tmp_path / "text.db", most=1)
    with sqlite3.connect(tmp_path / "new.db") as file:
        file.execute("PRAGMA user_version=99")
    with pytest.raises(UnreadableFile, match="version 99"):
        Archive(tmp_path / "new.db", most=1)


def test_specs_outlive_their_sessions_only_as_far_as_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "SPEC_ENTRIES", 2 * SPEC.entries + 1)
    made = Board(8)
    for name in ("first", "second", "third"):
        made.opened("ann", name, SPEC)
    made.opened("ben", "other", SPEC)
    large = SPEC.model_copy(update={"parameters": SPEC.parameters * 3})
    made.opened("ann", "large", large)
    kept = {name: made.get("ann", name).spec for name in ("first", "second", "third", "large")}
    assert kept == {"first": None, "second": SPEC, "third": SPEC, "large": None}
    assert made.get("ben", "other").spec is SPEC
