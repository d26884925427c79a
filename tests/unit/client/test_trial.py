"""Patches on trial: kept, undone, and what holds the next ones back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from nowcast_client import TrialSettings, attach
from nowcast_client.errors import AttachError

from .service import FakeService, linear, nothing
from .training import QUICK, Drift, Training, harmful


def test_without_a_reported_loss_nothing_is_patched(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(FakeService(linear))
    with caplog.at_level(logging.WARNING, "nowcast"):
        training.run(120, report=False)
    assert "patched" not in training.kinds()
    assert sum("observe(loss)" in r.message for r in caplog.records) == 1


def test_good_patch_is_kept() -> None:
    service = FakeService(lambda h, k: {n: 0.1 * v for n, v in linear(h, 1).items()})
    training = Training(service)
    training.run(90)
    assert training.kinds()[:3] == ["nowcast", "patched", "kept"]
    assert training.first("kept").step == 50 + 50 // 3
    training.handle.wait(60)
    assert [outcome for _, outcome in service.verdicts] == ["applied", "kept"]
    assert training.handle.summary()["harm_steps"] == 0


@pytest.mark.parametrize(
    ("by", "most", "reason"),
    [(0.004, 4, "brought no better loss lately"), (0.0125, 3, "above the best it has been")],
)
def test_a_drift_of_small_harms_holds_nowcasts_back_until_the_loss_is_back(
    by: float, most: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(FakeService(nothing))
    drift = Drift(training, by)
    with caplog.at_level(logging.WARNING, "nowcast"):
        training.run(1000, loss_of=drift)
    patched = training.kinds().count("patched")
    assert patched == training.kinds().count("kept")  # no verdict saw anything
    assert 2 <= patched <= most
    assert sum(n for text, n in training.handle.summary()["skipped"].items() if reason in text) >= 10
    assert sum(reason in record.message for record in caplog.records) == 1

    resumed = Training(FakeService(nothing))
    resumed.handle.load_state_dict(training.handle.state_dict())
    resumed.run(100, loss_of=lambda step, loss: drift(step, loss))
    assert "patched" not in resumed.kinds()

    drift.recovers = True
    training.run(100, loss_of=drift)
    assert training.kinds().count("patched") == patched + 2


def test_without_a_trial_a_drift_is_no_reason_to_wait() -> None:
    training = Training(FakeService(nothing), trial=False)
    training.run(500, loss_of=Drift(training, 0.004))
    assert training.kinds().count("patched") == 10


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop", "Adagrad"])
def test_slow_harm_is_rolled_back_bit_for_bit(optimizer: str) -> None:
    service = FakeService(linear)
    training = Training(service, mode="off")
    kwargs = {"momentum": 0.9} if optimizer == "SGD" else {}
    training.optimizer = getattr(torch.optim, optimizer)(training.model.parameters(), lr=1e-3, **kwargs)
    training.handle = attach(
        training.model,
        training.optimizer,
        transport=service.transport,
        period=50,
        mode="on",
        wait=60.0,
        retry=QUICK,
        on_event=training.events.append,
    )
    saved: dict[str, Any] = {}
    predict = service.predict

    def save(history: Sequence[Mapping[str, np.ndarray]], k: int) -> Mapping[str, np.ndarray]:
        # The trainer waits inside its hook while this runs: the state is the one right before the patch.
        saved["weights"] = training.weights()
        saved["state"] = [
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
            for s in training.optimizer.state.values()
        ]
        return predict(history, k)

    service.predict = save
    patched_at = 50

    def creeping(step: int, loss: float) -> float:
        # Nothing to see at first; every step a little worse.
        return 1.0 + (0.02 * (step - patched_at) if step >= patched_at else 0.0)

    training.run(50 + 50 // 3, loss_of=creeping)
    assert training.kinds() == ["nowcast", "patched", "rolled_back"]
    assert training.first("rolled_back").detail["lost"] == 50 // 3
    for name, weight in training.weights().items():
        assert torch.equal(weight, saved["weights"][name])
    now = list(training.optimizer.state.values())
    for old, new in zip(saved["state"], now, strict=True):
        assert old.keys() == new.keys()
        for key, value in old.items():
            same = torch.equal(value, new[key]) if isinstance(value, torch.Tensor) else value == new[key]
            assert same, key
    assert training.handle.summary()["harm_steps"] == 50 // 3
    training.handle.wait(60)
    assert [outcome for _, outcome in service.verdicts] == ["applied", "rolled_back"]


def test_spike_that_recovers_is_kept() -> None:
    training = Training(FakeService(linear))

    def spike(step: int, loss: float) -> float:
        return 1.0 + (0.5 * 0.8 ** (step - 50) - 0.02 if step >= 50 else 0.0)

    training.run(90, loss_of=spike)
    assert training.kinds()[:3] == ["nowcast", "patched", "kept"]


def test_not_a_number_is_undone_at_once() -> None:
    training = Training(FakeService(linear))
    training.run(54, loss_of=lambda step, loss: float("nan") if step >= 50 else loss)
    assert training.kinds() == ["nowcast", "patched", "rolled_back"]
    assert training.first("rolled_back").step == 52


def test_a_really_harmful_patch_is_undone_by_the_real_loss() -> None:
    training, alone = Training(FakeService(harmful), lr=1e-3), Training(FakeService(harmful), lr=1e-3, mode="off")
    training.run(50 + 50 // 3)
    alone.run(50)
    assert training.kinds() == ["nowcast", "patched", "rolled_back"]
    assert all(torch.equal(a, b) for a, b in zip(training.weights().values(), alone.weights().values(), strict=True))


def test_two_rollbacks_in_a_row_switch_off() -> None:
    training = Training(FakeService(linear))
    with pytest.warns(RuntimeWarning, match="two nowcasts in a row"):
        training.run(250, loss_of=lambda step, loss: 1.0 + (training.kinds()[-1:] == ["patched"]))
    assert training.kinds().count("rolled_back") == 2
    assert training.kinds()[-1] == "off"
    assert training.handle.mode == "off"
    taken = training.handle.summary()["snapshots"]
    training.run(100)
    assert training.handle.summary()["snapshots"] == taken


def test_window_begins_again_after_a_rollback() -> None:
    training = Training(FakeService(linear))
    training.run(140, loss_of=lambda step, loss: 1.0 + (0.05 * (step - 50) if 50 <= step < 66 else 0.0))
    training.handle.wait(60)
    # Rolled back at 66: the snapshot of step 60 is of weights that are gone, the next window is 70 … 110.
    asked = [job.steps for job in training.service.jobs.values()]
    assert asked == [(10, 20, 30, 40, 50), (70, 80, 90, 100, 110)]
    # It was taken all the same; whether it was sent before the rollback is the uploader's luck.
    assert training.handle.summary()["snapshots"] == 14


def test_trial_settings_are_capped_by_the_period() -> None:
    training = Training(FakeService(linear), trial=TrialSettings(window=1000))
    assert training.handle._nowcasting.trials.settings == TrialSettings(window=16)


def test_nowcasts_wait_while_the_held_out_loss_is_above_its_best() -> None:
    training = Training(FakeService(nothing), period=50)
    saved: dict[str, Any] = {}
    for number, loss in enumerate([1.0, 0.8, 0.9, 0.9, 0.7, 0.69]):
        if number:
            training.handle.observe(torch.tensor(loss), split="validation")
        training.run(50, loss_of=lambda step, _: 1.0 - 0.001 * step)
        saved = training.handle.state_dict() if number == 2 else saved
    reasons = [(e.step, e.detail["reason"]) for e in training.events if e.kind == "skipped"]
    assert [step for step, reason in reasons if "held-out" in reason] == [150, 200]
    assert training.handle.summary()["patched"] == 4
    resumed = Training(FakeService(nothing), period=50)
    resumed.handle.load_state_dict(saved)
    resumed.run(50, loss_of=lambda step, _: 1.0 - 0.001 * step)
    assert any("held-out" in event.detail["reason"] for event in resumed.events if event.kind == "skipped")
    with pytest.raises(AttachError, match="validation"):
        training.handle.observe(1.0, split="test")  # type: ignore[arg-type]
