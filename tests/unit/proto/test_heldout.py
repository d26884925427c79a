"""Nowcasts wait while the held-out loss lies above the best it has been."""

from __future__ import annotations

import json

import numpy as np
from nowcast_proto.rules.heldout import HeldOut


def waits(losses: list[float]) -> list[bool]:
    """Whether nowcasts wait after each of these."""
    watched, found = HeldOut(), []
    for number, loss in enumerate(losses):
        watched.add(100 * number, loss)
        found.append(bool(watched.objection()))
    return found


def test_a_training_that_overfits_gets_none_until_it_is_back() -> None:
    assert waits([1.0, 0.8, 0.7, 0.703, 0.72, 0.8, 0.69]) == [False, False, False, False, True, True, False]


def test_values_that_scatter_are_allowed_to() -> None:
    rng = np.random.default_rng(0)
    flat = [0.7 + 0.02 * float(rng.normal()) for _ in range(100)]
    assert np.mean([np.mean(waits(flat[i : i + 50])) for i in (0, 50)]) <= 0.35
    assert all(waits([*flat, *[0.9] * 5])[-5:])


def test_batches_of_one_evaluation_are_averaged_and_what_is_no_number_is_not_there() -> None:
    watched = HeldOut()
    assert watched.objection() == ""
    for loss in (0.5, 1.5, float("nan")):
        watched.add(100, loss)
    watched.add(200, 0.9)
    watched.add(200, 1.1)
    assert watched.objection() == ""
    watched.add(300, 1.004)  # within half a per cent of the best: 1.0, not 0.5 or 0.9
    assert watched.objection() == ""
    watched.add(400, 1.006)
    assert watched.objection()


def test_losses_of_weights_that_still_recover_are_compared_with_each_other() -> None:
    watched = HeldOut()
    watched.add(100, 0.5)
    watched.add(200, 0.9, recovering=True)
    assert watched.objection() == ""
    watched.add(300, 1.0, recovering=True)
    assert watched.objection()
    watched.add(400, 0.4)
    assert watched.objection() == ""


def test_it_goes_on_where_it_was() -> None:
    one, two = HeldOut(), HeldOut()
    for step in range(20):
        one.add(step, 1.0 / (step + 1))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for watched in (one, two):
        watched.add(20, 0.06)
        assert watched.objection()
    two.load_state_dict({})
    assert two.state_dict() == HeldOut().state_dict()
