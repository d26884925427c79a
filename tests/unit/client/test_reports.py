"""What people who watch are told: batches, bounded, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from nowcast_client.loop.reports import EVERY, SOON, About, Reports, thinned
from nowcast_proto.rules.verdict import LossTrace
from nowcast_proto.trainings import Report

ABOUT = About("digits", "cpu", "AdamW", 100, 1000)


def collecting(*, takes: bool = True, arrives: bool = True) -> tuple[Reports, list[Report]]:
    sent: list[Report] = []

    def send(make: Callable[[], Report], arrived: Callable[[], None]) -> bool:
        if takes:
            sent.append(make())
            if arrives:
                arrived()
        return takes

    return Reports(ABOUT, send), sent


def trace(steps: range) -> LossTrace:
    made = LossTrace(keep=10_000)
    for step in steps:
        made.add(step, float(step))
    return made


def test_each_loss_and_event_is_told_once() -> None:
    reports, sent = collecting()
    assert reports.due(0.0, 1)
    losses = trace(range(6))
    reports.event("patched", 3, {"k": 20, "of": 2})
    reports.tell(0.0, 5, "on", losses)
    assert not reports.due(EVERY / 2, 6)
    assert reports.due(EVERY, 6)
    assert reports.due(EVERY / 2, 5 + SOON)
    losses.add(6, 6.0)
    (last,) = [reports.last(7, "on", losses)()]
    assert sent[0].loss_steps == (0, 1, 2, 3, 4)  # the newest may still be averaged with others
    assert [(e.kind, e.step, e.horizon) for e in sent[0].events] == [("patched", 3, 20)]
    assert (last.loss_steps, last.losses, last.events) == ((5, 6), (5.0, 6.0), ())
    assert last.ended


@pytest.mark.parametrize("takes", [False, True])
def test_what_did_not_arrive_is_told_with_the_next(*, takes: bool) -> None:
    reports, _ = collecting(takes=takes, arrives=False)
    reports.event("kept", 2, {"reason": "the loss is back on trend"})
    reports.tell(0.0, 3, "on", trace(range(4)))
    last = reports.last(3, "on", trace(range(4)))()
    assert last.loss_steps == (0, 1, 2, 3)
    assert last.events[0].reason == "the loss is back on trend"


def test_many_losses_become_means_and_what_is_no_number_is_left_out() -> None:
    steps = np.arange(10_500, dtype=np.float64)
    losses = steps.copy()
    losses[7] = np.nan
    ends, means = thinned(steps, losses)
    assert len(ends) == len(means) == 1_000
    assert ends[-1] == 10_499
    assert np.mean(means) == pytest.approx(np.nanmean(losses), rel=1e-3)


def test_events_nobody_watches_are_left_out() -> None:
    reports, sent = collecting()
    reports.event("snapshot", 3, {"bytes": 12})
    reports.tell(0.0, 5, "on", trace(range(2)))
    assert sent[0].events == ()


def test_about_reads_model_and_optimizer() -> None:
    model = torch.nn.Linear(2, 2)
    about = About.of(model, torch.optim.SGD(model.parameters(), 0.1), None, 100, None)
    assert about.name.startswith("Linear on ")
    assert (about.device, about.optimizer) == ("cpu", "SGD")
    assert About.of(model, None, "mine", 100, None).name == "mine"
