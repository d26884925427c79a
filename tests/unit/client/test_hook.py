"""`attach` against a fake service: cadence, patches, staleness, modes, what is refused at once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nowcast_client import attach
from nowcast_client.errors import AttachError
from torch import nn

from .service import FakeService, linear, nothing
from .training import Training


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


def test_metrics_are_plain_numbers() -> None:
    rows: list[tuple[Mapping[str, float], int]] = []
    training = Training(FakeService(linear), trial=False, metrics=lambda numbers, step: rows.append((numbers, step)))
    training.run(60)
    assert [step for _, step in rows] == [50, 50]
    assert all(isinstance(v, float) for numbers, _ in rows for v in numbers.values())


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


@pytest.mark.parametrize(("total", "scale"), [(300, 0.5), (2000, 0.15)])
def test_where_many_nowcasts_are_planned_the_first_are_small(total: int, scale: float) -> None:
    service = FakeService(nothing)
    training = Training(service, total_steps=total, update_scale=0.5)
    training.run(60, loss_of=lambda step, _: 1.0 - 0.001 * step)
    assert [job.update_scale for job in service.jobs.values()] == [pytest.approx(scale)]
