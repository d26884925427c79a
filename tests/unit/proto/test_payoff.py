"""Whether the nowcasts of a training pay, told from those that were left out at random."""

from __future__ import annotations

import json

import numpy as np
import pytest
from nowcast_proto.rules.payoff import BLOCK, FIRST, Payoff


def training(seed: int, periods: int, effect: float) -> tuple[int, bool]:
    """A loss that falls ever more slowly, and by ``effect`` more at every nowcast, in units of its level's noise.

    Returns:
        Nowcasts made, and whether they were stopped.
    """
    draw, payoff, made = np.random.default_rng(seed), Payoff(), 0
    for period in range(1, periods + 1):
        payoff.over(2 + 1.5 * period**-0.5 + 0.01 * (draw.normal() - effect * made))
        why = payoff.objection()
        if "no more" in why:
            return made, True
        if not why:
            payoff.kept()
            made += 1
    return made, False


@pytest.mark.parametrize(
    ("effect", "least", "most"),
    [(-2, 0.95, 1.0), (-1, 0.85, 1.0), (0, 0.4, 0.9), (2, 0.0, 0.25), (4, 0.0, 0.02)],
)
def test_error_rates(effect: float, least: float, most: float) -> None:
    """Of two hundred trainings of fifty periods: how many it stops, by what a nowcast does to the level."""
    stopped = [training(seed, 50, effect)[1] for seed in range(200)]
    assert least <= float(np.mean(stopped)) <= most


def test_a_training_of_ten_nowcasts_is_hardly_touched() -> None:
    for seed in range(20):
        made, stopped = training(seed, 10, -3)
        assert not stopped
        assert made >= 9
    payoff = Payoff()
    for _ in range(FIRST):
        payoff.over(1.0)
        assert payoff.objection() == ""
        payoff.kept()


def test_one_of_every_block_is_left_out() -> None:
    payoff = Payoff()
    for _ in range(FIRST):
        payoff.over(1.0)
        payoff.kept()
    left_out = []
    for _ in range(5 * BLOCK):
        payoff.over(1.0 - 0.001 * payoff.made)  # every nowcast gains a little
        left_out.append(bool(payoff.objection()))
        if not left_out[-1]:
            payoff.kept()
    assert [sum(left_out[i : i + BLOCK]) for i in range(0, 5 * BLOCK, BLOCK)] == [1] * 5
    assert all(gain == pytest.approx(0.001) for gain in payoff.gains())


def test_a_period_that_waited_for_another_reason_is_no_control() -> None:
    """What waits for a bad loss would look like a period in which the loss recovers by itself."""
    payoff = Payoff()
    for kind, level in (("nowcast", 3.0), ("", 2.0), ("nowcast", 1.0), ("", 0.5)):
        if kind:
            payoff.kept()
        payoff.over(level)
    assert payoff.kinds == ["nowcast", "", "nowcast", ""]
    assert payoff.gains() == []


def test_it_goes_on_where_it_was() -> None:
    one = Payoff()
    for period in range(30):
        one.over(1.0 / (period + 1))
        if not one.objection():
            one.kept()
        if period == 17:
            two = Payoff()
            two.load_state_dict(json.loads(json.dumps(one.state_dict())))
        if period > 17:
            two.over(1.0 / (period + 1))
            if not two.objection():
                two.kept()
    assert two.state_dict() == one.state_dict()
    empty = Payoff()
    empty.load_state_dict({})
    assert empty.state_dict() == Payoff().state_dict()
