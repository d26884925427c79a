"""The judge, on simulated losses: how often it is wrong, on the shapes that were measured on real trainings."""

from __future__ import annotations

import numpy as np
import pytest
from nowcast_proto.rules.verdict import BestLevel, LossTrace, TrialSettings, Verdict, hopeless, judge, noise

DRAWS = 300


def decide(
    after_mean: np.ndarray, sigma: float, seed: int, *, slope: float = 0.0, settings: TrialSettings | None = None
) -> Verdict:
    """Judge one simulated nowcast: level 1.5 before it, ``after_mean`` above that after it."""
    settings = settings or TrialSettings(window=len(after_mean))
    rng = np.random.default_rng(seed)
    before_steps = np.arange(1000.0 - settings.reference, 1000.0)
    after_steps = np.arange(1000.0, 1000.0 + len(after_mean))
    before = 1.5 + slope * (before_steps - 975.0) + rng.normal(0, sigma, len(before_steps))
    after = 1.5 + slope * (after_steps - 975.0) + after_mean + rng.normal(0, sigma, len(after_mean))
    return judge(before_steps, before, after_steps, after, patched_at=1000, settings=settings)


def kept(after_mean: np.ndarray, sigma: float, **kwargs: object) -> float:
    """Share of patches that are kept over many draws of the noise."""
    return float(np.mean([decide(after_mean, sigma, seed, **kwargs).keep for seed in range(DRAWS)]))  # type: ignore[arg-type]


def recovery(*tens: float) -> np.ndarray:
    """Loss above its old level, step by step, from means over ten steps each."""
    centres = np.arange(-5.0, 10.0 * len(tens), 10.0)
    start = 2 * tens[0] - tens[1]  # the first ten steps fall as steeply as the next
    return np.interp(np.arange(10.0 * len(tens)), centres, [start, *tens])


# Mean of ten steps minus the mean over 50 before the nowcast, as measured on real trainings.
GOOD = {
    "image, period 1000, first": recovery(0.17, 0.02, -0.01, -0.09, -0.08),
    "image, period 1000, second": recovery(0.44, 0.15, 0.08, -0.03, -0.04),
    "image, period 200, first": recovery(0.24, 0.03, -0.04, -0.08, -0.10),
    "image, period 200, third": recovery(0.27, 0.12, 0.02, -0.07, -0.11),
    "text, no spike at first": recovery(-0.15, -0.20, -0.23, -0.25, -0.26),
    "text, third": recovery(0.08, 0.04, 0.0, 0.0, -0.05),
}


@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.2])
@pytest.mark.parametrize("name", GOOD)
def test_good_nowcasts_are_kept(name: str, sigma: float) -> None:
    assert kept(GOOD[name], sigma) >= 0.99


def test_a_window_too_short_to_recover_in_sees_that_the_spike_is_falling() -> None:
    # Period 50 leaves 16 steps, in which a good image nowcast is not back yet.
    assert kept(GOOD["image, period 200, third"][:16], 0.05) >= 0.9


@pytest.mark.parametrize(
    ("harm", "sigma", "caught"),
    [
        (np.full(50, 0.15), 0.1, 0.95),  # a step up that stays
        (np.full(50, 0.3), 0.1, 0.99),
        (np.linspace(0, 0.5, 50), 0.1, 0.99),  # slow harm: nothing to see at first
        (np.linspace(0, 0.25, 50), 0.1, 0.9),
        (recovery(0.44, 0.30, 0.26, 0.25, 0.25), 0.1, 0.99),  # a spike that stays half-way
        (recovery(8.0, 7.5, 7.2, 7.0, 6.9), 0.1, 0.99),  # blown up; falls fast, but not back within another window
        (600.0 * 0.95 ** np.arange(50), 0.1, 0.99),  # blown up; a straight line through it would be back in time
        (600.0 * 0.93 ** np.arange(16), 0.1, 0.99),  # the same in a short window
    ],
)
def test_harmful_nowcasts_are_undone(harm: np.ndarray, sigma: float, caught: float) -> None:
    assert 1.0 - kept(harm, sigma) >= caught


def test_no_change_at_all_is_not_harm() -> None:
    assert kept(np.zeros(50), 0.2) >= 0.99


def test_a_nowcast_that_only_undoes_recent_progress_is_bounded() -> None:
    """A falling trend: weights as good as those of the reference window pass, clearly worse ones do not."""
    falling = -0.004
    assert kept(np.full(50, -falling * 40), 0.02, slope=falling) >= 0.95
    assert kept(np.full(50, -falling * 40 + 0.25), 0.02, slope=falling) <= 0.05


def test_a_loss_that_was_rising_anyway_is_not_the_nowcasts_fault() -> None:
    assert kept(np.zeros(50), 0.02, slope=0.004) >= 0.95


def test_a_few_outliers_do_not_change_the_verdict() -> None:
    shape = GOOD["image, period 1000, first"].copy()
    shape[35] += 20.0
    assert kept(shape, 0.1) >= 0.99


def test_not_a_number_is_hopeless_but_one_infinity_is_not() -> None:
    assert hopeless(np.array([1.0, np.nan, np.nan]))
    assert not hopeless(np.array([1.0, np.inf]))
    assert not hopeless(np.array([np.nan, np.nan, 1.0]))
    verdict = decide(np.array([0.0] * 48 + [np.nan] * 2), 0.1, 0)
    assert not verdict.keep
    one = np.zeros(50)
    one[40] = np.inf
    assert decide(one, 0.1, 0).keep


def test_silence_in_the_window_is_no_proof() -> None:
    steps = np.arange(950.0, 1000.0)
    some = np.arange(1000.0, 1010.0)
    settings = TrialSettings()
    verdict = judge(steps, np.ones(50), some, np.ones(10), patched_at=1000, settings=settings)
    assert not verdict.keep
    assert "0 losses" in verdict.reason


def test_a_loss_without_noise_still_has_a_margin() -> None:
    assert decide(np.full(50, 0.001), 0.0, 0).keep
    assert not decide(np.full(50, 0.02), 0.0, 0).keep


def test_noise_is_blind_to_a_trend_and_to_outliers() -> None:
    rng = np.random.default_rng(0)
    losses = np.linspace(5, 1, 400) + rng.normal(0, 0.1, 400)
    losses[::40] += 10
    assert noise(losses) == pytest.approx(0.1, rel=0.3)


def test_reports_for_one_step_are_averaged_and_old_ones_forgotten() -> None:
    trace = LossTrace(keep=3)
    for step, loss in [(1, 9.0), (2, 1.0), (2, 3.0), (3, 5.0), (4, 7.0)]:
        trace.add(step, loss)
    steps, losses = trace.between(0, 10)
    assert steps.tolist() == [2, 3, 4]
    assert losses.tolist() == [2.0, 5.0, 7.0]


def held(levels: np.ndarray, seed: int, *, sigma: float = 0.1, size: int = 100) -> list[bool]:
    """Whether nowcasts would be held back after each stretch of losses around one of these levels; others are kept.

    That some are left out as controls is another rule, see ``test_payoff.py``.
    """
    rng = np.random.default_rng(seed)
    best, waits = BestLevel(TrialSettings()), []
    for step, level in enumerate(levels):
        why = best.objection(step, level + rng.normal(0, sigma, size))
        waits.append(why.startswith(("the loss is above", "nowcasts have brought")))
        if not waits[-1]:
            best.tried(kept=True)
    return waits


def test_a_drift_that_no_verdict_sees_ends_nowcasts() -> None:
    """Every nowcast costs half of what its own verdict would let pass."""
    assert kept(np.full(50, 0.02), 0.1) >= 0.95
    drift = np.concatenate((np.linspace(2.0, 1.0, 10), 1.0 + 0.02 * np.arange(1, 40)))
    for seed in range(20):
        waits = held(drift, seed)
        assert not any(waits[:10])
        assert drift[waits.index(True)] <= 1.1
        assert all(waits[13:])


def test_nowcasts_go_on_once_the_loss_is_back() -> None:
    assert held(np.array([1.5, 1.0, 1.4, 1.2, 1.0, 0.9]), 0) == [False, False, True, True, False, False]


def test_nowcasts_that_only_take_back_what_training_makes_good_are_paused_for_longer_and_longer() -> None:
    """Level with the best, never better: three more, then none until training alone has brought a lower loss; then two,
    and none until it has brought two."""
    levels = [1.5, 1.0, 1.004, 1.004, 1.004, 1.003, 0.9, 0.904, 0.904, 0.904, 0.85, 0.84, 0.8]
    waits = [False] * 4 + [True] * 2 + [False] * 2 + [True] * 3 + [False] * 2
    assert held(np.array(levels), 0, sigma=0.005) == waits


@pytest.mark.parametrize(("fall", "most"), [(2.0, 0.0), (1.0, 0.03), (0.5, 0.4)])
def test_a_falling_loss_holds_little_back(fall: float, most: float) -> None:
    """A loss that falls from stretch to stretch by this many standard errors of its level, for thirty stretches."""
    waits = [held(2.0 - 0.01 * fall * np.arange(30), seed) for seed in range(60)]
    assert np.mean(waits) <= most


def test_too_few_losses_hold_nothing_back_and_leave_no_mark() -> None:
    best = BestLevel(TrialSettings())
    assert not best.objection(0, np.array([0.1, 0.1]))
    assert not best.objection(0, np.array([np.nan] * 20))
    assert best.best is None
    assert not best.objection(0, np.array([1.0] * 20 + [np.nan, 1e9]))
    assert "above the best" in best.objection(0, np.full(20, 1.02))
