"""`attach` against a fake service: cadence, patches, trials, staleness, modes, resume, faults."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nowcast_client import TrialSettings, attach
from nowcast_client.errors import AttachError, TransportError
from nowcast_client.handle import Event, Handle
from nowcast_client.testing import FaultyTransport
from nowcast_client.wire.transport import Retry
from nowcast_proto.errors import InvalidSnapshot, NowcastError, UnsupportedArchitecture
from torch import nn

from .service import FakeService, linear, nothing

QUICK = Retry(attempts=3, base=0.001, cap=0.01)


class Training:
    """A tiny regression on fixed data; ``loss_of`` may replace the reported loss."""

    def __init__(self, service: FakeService, *, lr: float = 1e-2, seed: int = 0, **kwargs: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.x = torch.randn(64, 4)
        self.y = self.x.sum(1, keepdim=True).sin()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.events: list[Event] = []
        self.service = service
        kwargs.setdefault("transport", service.transport)
        kwargs.setdefault("wait", 60.0)
        kwargs.setdefault("period", 50)
        kwargs.setdefault("retry", QUICK)
        self.handle: Handle = attach(self.model, self.optimizer, on_event=self.events.append, **kwargs)

    def run(self, steps: int, *, loss_of: Callable[[int, float], float] | None = None, report: bool = True) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.model(self.x), self.y)
            loss.backward()
            if report:
                self.handle.observe(loss if loss_of is None else loss_of(self.handle.step, loss.item()))
            self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events if event.kind != "snapshot"]

    def first(self, kind: str) -> Event:
        return next(event for event in self.events if event.kind == kind)


def test_cadence_snapshots_and_horizons() -> None:
    asked: list[tuple[int, ...]] = []
    service = FakeService(lambda history, k: (asked.append((k, len(history))), nothing(history, k))[1])
    training = Training(service, trial=False, total_steps=200)
    training.run(200)
    assert training.handle.summary()["snapshots"] == 20
    # The last of four comes at the very end, where no step would profit from it.
    assert asked == [(20, 5), (11, 5), (5, 5)]
    patched = [event for event in training.events if event.kind == "patched"]
    assert [(event.step, event.detail["of"], event.detail["behind"]) for event in patched] == [
        (50, 50, 0),
        (100, 100, 0),
        (150, 150, 0),
    ]


def test_patch_adds_the_predicted_change_and_leaves_moments_alone() -> None:
    service = FakeService(linear)
    training = Training(service, trial=False)
    training.run(49)
    before: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}

    def look(history: Sequence[Mapping[str, np.ndarray]], k: int) -> Mapping[str, np.ndarray]:
        before.update({n: torch.from_numpy(v.copy()) for n, v in history[-1].items()})
        deltas = linear(history, k)
        seen.update({n: torch.from_numpy(v.astype(np.float32)) for n, v in deltas.items()})
        return deltas

    service.predict = look
    training.run(1)
    moments = [s["exp_avg"].clone() for s in training.optimizer.state.values()]
    for name, weight in training.weights().items():
        assert torch.equal(weight, before[name] + seen[name])
        assert not torch.equal(weight, before[name])
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, training.optimizer.state.values(), strict=True))


def test_delta_is_added_to_newer_weights_when_training_went_on() -> None:
    service = FakeService(linear)
    service.gate.clear()
    training = Training(service, trial=False, wait=0.0)
    twin = Training(FakeService(nothing), mode="off")
    training.run(53)
    twin.run(53)
    assert all(torch.equal(a, b) for a, b in zip(training.weights().values(), twin.weights().values(), strict=True))
    service.gate.set()
    assert training.handle.wait(60)
    training.run(1)
    twin.run(1)
    event = training.first("patched")
    assert (event.step, event.detail["of"], event.detail["behind"]) == (54, 50, 4)
    session = next(iter(service.sessions.values()))[1]
    deltas = linear([session[s][1] for s in (10, 20, 30, 40, 50)], 20)
    for name, weight in twin.weights().items():
        assert torch.equal(training.weights()[name], weight + torch.from_numpy(deltas[name].astype(np.float32)))


@pytest.mark.parametrize("stale_steps", [None, 0])
def test_a_nowcast_beyond_its_bound_is_rejected(stale_steps: int | None) -> None:
    service = FakeService(linear)
    service.gate.clear()
    training = Training(service, trial=False, wait=0.0, stale_steps=stale_steps)
    training.run(50 + (10 if stale_steps is None else 0))
    service.gate.set()
    assert training.handle.wait(60)
    before = training.weights()
    training.run(1)
    assert training.kinds() == ["nowcast", "rejected"]
    assert "steps after its last snapshot" in training.first("rejected").detail["reason"]
    assert training.handle.summary()["patched"] == 0
    assert before.keys() == training.weights().keys()


def test_shadow_predicts_and_never_patches() -> None:
    training, alone = Training(FakeService(linear), mode="shadow"), Training(FakeService(linear), mode="off")
    training.run(120)
    alone.run(120)
    assert training.kinds() == ["nowcast", "shadow"] * 2
    assert all(torch.equal(a, b) for a, b in zip(training.weights().values(), alone.weights().values(), strict=True))
    assert alone.handle.summary()["snapshots"] == 0


@pytest.mark.parametrize(("fields", "warned"), [({}, True), ({"checkpoint": "mine"}, False), ({"period": 100}, False)])
def test_more_nowcasts_than_the_shipped_weights_are_good_for_are_warned_of(
    fields: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nowcast"):
        Training(FakeService(nothing), **{"period": 50, "total_steps": 2000, **fields})
    assert any("period=50 makes 40 nowcasts" in record.message for record in caplog.records) is warned


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


class Drift:
    """A loss of 1 that every nowcast raises by a little, and that falls below 1 once `recovers` is set."""

    def __init__(self, training: Training, by: float) -> None:
        self._training, self._by = training, by
        self.recovers = False

    def __call__(self, step: int, loss: float) -> float:
        patched = self._training.kinds().count("patched")
        return 1.0 + 0.02 * (step % 2) + (-0.05 if self.recovers else self._by * patched)


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


def harmful(history: Sequence[Mapping[str, np.ndarray]], k: int) -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(0)
    norms = {n: np.linalg.norm(history[-1][n] - history[-2][n]) for n in history[-1]}
    noises = {n: rng.normal(size=v.shape) for n, v in history[-1].items()}
    return {n: noises[n] / np.linalg.norm(noises[n]) * norms[n] * k for n in noises}


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


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda d: {n: v * np.nan for n, v in d.items()}, "NaN"),
        (lambda d: {n: v + 1e30 for n, v in d.items()}, "moves"),
        (lambda d: {n: v + 1e3 for n, v in d.items()}, "moves"),
        (lambda d: dict(list(d.items())[1:]), "other tensors"),
        (lambda d: {("x" if n == "0.bias" else n): v for n, v in d.items()}, "other tensors"),
        (lambda d: {n: v.T if v.ndim == 2 else v for n, v in d.items()}, "other tensors"),
        (lambda d: dict(reversed(d.items())), "other tensors"),
    ],
)
def test_absurd_replies_are_refused(spoil: Callable[[Any], Any], what: str) -> None:
    training = Training(FakeService(lambda h, k: spoil(linear(h, k))), trial=False)
    alone = Training(FakeService(linear), mode="off")
    training.run(60)
    alone.run(60)
    assert "patched" not in training.kinds()
    failed = [event for event in training.events if event.kind in ("failed", "rejected")]
    assert what in failed[0].detail["message"]
    assert all(torch.equal(a, b) for a, b in zip(training.weights().values(), alone.weights().values(), strict=True))


@pytest.mark.parametrize(("strides", "taken"), [(40, True), (400, False)])
def test_a_nowcast_of_a_short_horizon_may_reach_farther(strides: int, taken: bool) -> None:
    """A refined network moves what hardly moved by many strides even at the last horizon; not by any number of them."""
    service = FakeService(lambda history, k: {n: strides * (v - history[-2][n]) for n, v in history[-1].items()})
    training = Training(service, trial=False, max_horizon=1)
    training.run(60)
    assert ("patched" in training.kinds()) is taken
    refused = [event for event in training.events if event.kind in ("failed", "rejected")]
    assert all("4 x 20 strides" in event.detail["message"] for event in refused)
    assert bool(refused) is not taken


def test_corrupted_bytes_never_become_a_patch() -> None:
    """Every byte of a reply's header and 200 of its payload, one bit flipped at each try."""
    service = FakeService(nothing)
    alone = Training(FakeService(nothing), mode="off")
    alone.run(50)
    collected: list[bytes] = []
    service.spoil = lambda body: (collected.append(body), body)[1]
    training = Training(service, trial=False)
    training.run(50)
    body = collected[0]
    header = 4 + int.from_bytes(body[:4], "little")
    rng = np.random.default_rng(0)
    places = [*range(0, header, 3), *rng.integers(header, len(body), 60).tolist()]
    session = training.handle._nowcasting.windows.uploader.session  # type: ignore[union-attr]
    job = next(iter(service.jobs.values()))
    refused = 0
    harmless = 0
    for place in places:
        bit = 1 << int(rng.integers(8))

        def flip(body: bytes, place: int = place, bit: int = bit) -> bytes:
            return body[:place] + bytes([body[place] ^ bit]) + body[place + 1 :]

        service.spoil = flip
        session._retry = Retry(attempts=1)
        try:
            message, frames = session._fetch(job, time.monotonic() + 60)
        except NowcastError:  # any other exception would fail the test
            refused += 1
        else:
            # A flipped bit in a field nobody acts on (timings, the checkpoint's name) changes no weight.
            assert all(not np.frombuffer(f.view(), np.float32).any() for f in frames)
            assert message.k == job.k
            harmless += 1
    assert refused > 0.7 * len(places)


def test_service_that_forgets_gets_the_history_again() -> None:
    service = FakeService(linear)
    training = Training(service, trial=False)
    training.run(45)
    assert training.handle.wait(60)
    service.forget()
    training.run(15)
    assert "patched" in training.kinds()
    assert training.handle.summary()["resent"] >= 4


def test_faults_of_the_transport_are_ridden_out() -> None:
    """Requests of every kind fail once, in each of three ways; the weights are those without faults."""
    clean = Training(FakeService(linear), trial=False)
    clean.run(55)
    for fault in ("before", "after", "body"):
        for at in range(8):  # the session, five snapshots, the question, the answer
            service = FakeService(linear)
            transport = FaultyTransport(service.transport, {at: fault})
            training = Training(service, trial=False, transport=transport)
            training.run(55)
            pairs = zip(training.weights().values(), clean.weights().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), (fault, at, training.kinds())
            assert transport.count > at
            training.handle.close()


def test_a_dead_service_costs_nothing_but_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    alone = Training(FakeService(linear), mode="off")
    alone.run(160)
    dead = FaultyTransport(FakeService(linear).transport, dict.fromkeys(range(100_000), "before"))
    training = Training(FakeService(linear), transport=dead, wait=0.01, nowcast_timeout=0.2)
    with caplog.at_level(logging.WARNING, "nowcast"):
        training.run(160)
        training.handle.wait(60)
        training.run(0)
    assert all(torch.equal(a, b) for a, b in zip(training.weights().values(), alone.weights().values(), strict=True))
    assert training.handle.summary()["failed"]
    assert 1 <= len([r for r in caplog.records if "failed" in r.message]) <= 4


def test_strict_raises() -> None:
    dead = FaultyTransport(FakeService(linear).transport, dict.fromkeys(range(1000), "before"))
    training = Training(FakeService(linear), transport=dead, strict=True, nowcast_timeout=0.3)
    with pytest.raises(TransportError):
        training.run(200)


def test_full_ring_drops_the_window_and_never_waits() -> None:
    service = FakeService(linear)
    service.gate.clear()
    training = Training(service, trial=False, wait=0.0, stale_steps=200)
    training.run(170)
    skipped = training.handle.summary()["skipped"]
    assert any("buffer" in reason for reason in skipped)
    service.gate.set()
    training.handle.wait(60)
    training.run(60)
    training.handle.wait(60)
    training.run(10)
    assert training.handle.summary()["arrived"] >= 1


def test_learning_rate_gate() -> None:
    training = Training(FakeService(linear), trial=False)
    training.run(60)
    training.optimizer.param_groups[0]["lr"] *= 0.05
    training.run(60)
    assert training.handle.summary()["asked"] == 1
    assert any("learning rate" in reason for reason in training.handle.summary()["skipped"])


def test_gradient_accumulation_counts_optimizer_steps() -> None:
    training = Training(FakeService(nothing), trial=False)
    for i in range(200):
        nn.functional.mse_loss(training.model(training.x), training.y).backward()
        if i % 4 == 3:
            training.optimizer.step()
            training.optimizer.zero_grad()
    assert training.handle.step == 50
    assert training.handle.summary()["patched"] == 1


def test_skipped_amp_steps_do_not_count() -> None:
    """A fused optimizer is stepped by the scaler even when it found infinities, and skips inside."""
    training = Training(FakeService(nothing), mode="off")
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-2, fused=True)
    handle = attach(training.model, training.optimizer, transport=training.service.transport, period=50, trial=False)
    scaler = torch.amp.GradScaler("cpu")
    for i in range(12):
        training.optimizer.zero_grad()
        loss = nn.functional.mse_loss(training.model(training.x), training.y)
        scaler.scale(loss * (float("inf") if i == 5 else 1.0)).backward()
        before = training.weights()
        scaler.step(training.optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before.values(), training.weights().values(), strict=True))
        assert moved == (i != 5)
    assert handle.step == 11


def test_wrapped_optimizer_is_unwrapped() -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    service = FakeService(nothing)
    training = Training(service, mode="off")
    handle = attach(
        training.model, Wrapper(Wrapper(training.optimizer)), transport=service.transport, period=50, trial=False
    )
    training.run(5)
    assert handle.step == 5


def test_resume_goes_on_in_the_same_window() -> None:
    service = FakeService(linear)
    whole = Training(FakeService(linear), trial=False)
    whole.run(70)
    first = Training(service, trial=False)
    first.run(30)
    assert first.handle.wait(60)
    state = {
        "model": first.model.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "nowcast": first.handle.state_dict(),
    }
    # The first process dies: nobody says goodbye to the service.
    first.handle._hooks.remove()
    second = Training(service, trial=False, seed=1)
    second.x, second.y = first.x, first.y
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.handle.load_state_dict(state["nowcast"])
    second.run(40)
    assert second.handle.step == 70
    assert next(iter(service.jobs.values())).steps == (10, 20, 30, 40, 50)
    assert all(torch.equal(a, b) for a, b in zip(second.weights().values(), whole.weights().values(), strict=True))


def test_resume_without_the_service_history_starts_the_window_again() -> None:
    service = FakeService(linear)
    first = Training(service, trial=False)
    first.run(30)
    first.handle.wait(60)
    state = first.handle.state_dict()
    service.forget()
    second = Training(service, trial=False)
    second.handle.load_state_dict(state)
    assert second.handle.wait(60)
    second.run(60)
    assert next(iter(service.jobs.values())).steps == (40, 50, 60, 70, 80)


def test_state_of_another_network_is_refused() -> None:
    training = Training(FakeService(linear))
    state = training.handle.state_dict() | {"network": "0" * 64}
    with pytest.raises(AttachError, match="another network"):
        training.handle.load_state_dict(state)


def test_replaced_parameters_restart_the_window() -> None:
    training = Training(FakeService(linear), trial=False)
    training.run(25)
    old = training.model[0].weight
    training.model[0].weight = nn.Parameter(old.detach().clone())
    training.optimizer.param_groups[0]["params"][0] = training.model[0].weight
    training.run(25)
    assert training.handle.summary()["asked"] == 0
    training.run(40)
    assert training.handle.summary()["patched"] == 1


def test_another_network_under_the_hook_switches_off() -> None:
    training = Training(FakeService(linear), trial=False)
    training.run(25)
    training.model[0] = nn.Linear(4, 16)
    training.model[2] = nn.Linear(16, 1)
    with pytest.warns(RuntimeWarning, match="nowcasting is off"):
        training.run(10)
    assert training.handle.mode == "off"


def test_a_callback_that_raises_is_survived() -> None:
    service = FakeService(linear)
    training = Training(service, trial=False)

    def bad(*args: object) -> None:
        raise RuntimeError("user code")

    training.handle._nowcasting.report.on_event = bad
    training.handle._nowcasting.report.metrics = bad
    training.run(60)
    assert training.handle.summary()["patched"] == 1
    assert training.handle.summary()["failed"] == {"metrics: RuntimeError": 2, "on_event: RuntimeError": 7}


def test_metrics_are_plain_numbers() -> None:
    rows: list[tuple[Mapping[str, float], int]] = []
    training = Training(FakeService(linear), trial=False, metrics=lambda numbers, step: rows.append((numbers, step)))
    training.run(60)
    assert [step for _, step in rows] == [50, 50]
    assert all(isinstance(v, float) for numbers, _ in rows for v in numbers.values())


def test_permanent_refusals_switch_off() -> None:
    service = FakeService(linear)

    def refuse(history: object, k: int) -> Any:
        raise UnsupportedArchitecture("no such family")

    service.predict = refuse
    training = Training(service, trial=False)
    with pytest.warns(RuntimeWarning, match="never accept"):
        training.run(60)
    assert training.handle.mode == "off"


def test_transient_refusals_do_not() -> None:
    service = FakeService(linear)

    def refuse(history: object, k: int) -> Any:
        raise InvalidSnapshot("NaN in a snapshot")

    service.predict = refuse
    training = Training(service, trial=False)
    training.run(120)
    assert training.handle.summary()["failed"] == {"nowcast: invalid_snapshot": 2}


def _forks_while_training() -> None:
    training = Training(FakeService(linear), trial=False)
    training.run(12)
    pid = os.fork()
    if pid == 0:
        ok = 1
        try:
            training.run(20)
            training.handle.close()
            ok = 0 if training.handle.step == 12 else 2
        finally:
            os._exit(ok)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    training.run(50)
    assert training.handle.summary()["patched"] == 1


def test_forked_child_does_nothing() -> None:
    """In a process of its own: a fork of one whose torch has several threads may not compute at all."""
    told = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import _forks_while_training as run; run()"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"mode": "maybe"}, "mode"),
        ({"wiat": 60.0}, "wait"),
        ({"stale": "delta"}, "stale_steps"),
        ({"wait": -1.0}, "wait"),
        ({"wire_dtype": "float7"}, "wire_dtype"),
        ({"context": 1}, "context"),
        ({"max_horizon": 0}, "max_horizon"),
        ({"period": 10}, "judge"),
        ({"url": "ftp://x", "transport": None}, "url"),
    ],
)
def test_what_cannot_work_is_said_at_attach(kwargs: dict[str, Any], what: str) -> None:
    with pytest.raises(AttachError, match=what):
        Training(FakeService(linear), **kwargs)


def test_dtypes_the_wire_lacks_are_refused() -> None:
    model = nn.Linear(2, 2).double()
    with pytest.raises(AttachError, match="float64"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), transport=FakeService(linear).transport)


def test_float32_masters_of_a_half_model_are_refused() -> None:
    model = nn.Linear(2, 2).bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD([*masters, *model.parameters()], lr=0.1)
    with pytest.raises(AttachError, match="master"):
        attach(model, optimizer, transport=FakeService(linear).transport)


def test_an_optimizer_of_another_model_is_refused() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(AttachError, match="none of the model"):
        attach(nn.Linear(2, 2), optimizer, transport=FakeService(linear).transport)


def test_half_precision_wire() -> None:
    training = Training(FakeService(linear), trial=False, wire_dtype="bfloat16", reply_dtype="bfloat16")
    training.run(60)
    assert training.handle.summary()["patched"] == 1


def test_only_trainable_tensors_are_patched() -> None:
    service = FakeService(lambda h, k: {n: v + 1e-4 for n, v in linear(h, k).items()})
    training = Training(service, mode="off")
    training.model[0].weight.requires_grad_(False)
    handle = attach(
        training.model,
        training.optimizer,
        transport=service.transport,
        period=50,
        trial=False,
        wait=60.0,
        include_frozen=True,
        patch_bound=1e9,
    )
    frozen = training.model[0].weight.detach().clone()
    training.run(60)
    assert handle.summary()["patched"] == 1
    assert torch.equal(frozen, training.model[0].weight)


def test_trial_settings_are_capped_by_the_period() -> None:
    training = Training(FakeService(linear), trial=TrialSettings(window=1000))
    assert training.handle._nowcasting.trials.settings == TrialSettings(window=16)


def test_close_is_quick_and_final() -> None:
    service = FakeService(linear)
    service.gate.clear()
    training = Training(service, trial=False, wait=0.0)
    training.run(50)
    start = time.monotonic()
    training.handle.close()
    assert time.monotonic() - start < 10.0  # it may take two; the nowcast it gives up may take three hundred
    training.run(20)
    assert training.handle.step == 50


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


@pytest.mark.parametrize(("total", "scale"), [(300, 0.5), (2000, 0.15)])
def test_where_many_nowcasts_are_planned_the_first_are_small(total: int, scale: float) -> None:
    service = FakeService(nothing)
    training = Training(service, total_steps=total, update_scale=0.5)
    training.run(60, loss_of=lambda step, _: 1.0 - 0.001 * step)
    assert [job.update_scale for job in service.jobs.values()] == [pytest.approx(scale)]
