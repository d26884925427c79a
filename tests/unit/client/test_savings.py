"""Steps saved: estimates on loss curves whose answer is known, and a training that really jumps ahead."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from nowcast_client.errors import AttachError
from nowcast_client.loggers import describe
from nowcast_client.loop.savings import SMOOTHED, Baseline, ahead
from nowcast_proto.rules.verdict import Floats

from ..ecosystem.loops import Watched, digits, network, step

AT, HALF, WINDOW = 600, 100, 50


def estimate(curve: Callable[[Floats], Floats], jump: float, noise: float, seed: int = 0) -> float | None:
    """Of a training that follows ``curve`` and is put ``jump`` steps ahead."""
    before = np.arange(AT - HALF, AT, dtype=float)
    after = np.arange(AT + WINDOW, AT + WINDOW + HALF, dtype=float)
    draw = np.random.default_rng(seed).normal
    old, new = curve(before), curve(after + jump)
    return ahead(before, old + noise * draw(size=HALF), after, new + noise * draw(size=HALF))


@pytest.mark.parametrize("jump", [-80.0, 0.0, 60.0, 120.0])
def test_on_a_straight_loss_the_estimate_is_the_jump(jump: float) -> None:
    def straight(steps: Floats) -> Floats:
        return 4.0 - 2e-3 * steps

    assert estimate(straight, jump, 0.0) == pytest.approx(jump, abs=1.0)
    found = [estimate(straight, jump, 0.05, seed) for seed in range(20)]
    assert np.mean(found) == pytest.approx(jump, abs=8.0)


@pytest.mark.parametrize("jump", [-40.0, 0.0, 60.0, 150.0])
def test_on_an_exponential_loss_too(jump: float) -> None:
    def curve(steps: Floats) -> Floats:
        return 1.0 + 3.0 * np.exp(-steps / 500.0)

    found = [estimate(curve, jump, 0.02, seed) for seed in range(20)]
    assert np.mean(found) == pytest.approx(jump, abs=8.0)


@pytest.mark.parametrize("jump", [0.0, 60.0, 150.0])
def test_on_a_power_law_it_errs_a_little_on_the_low_side(jump: float) -> None:
    def curve(steps: Floats) -> Floats:
        return 1.0 + 30.0 * steps**-0.6

    found = np.mean([estimate(curve, jump, 0.02, seed) for seed in range(20)])
    assert 0.8 * jump - 10.0 < found < jump + 5.0


def test_no_estimate_without_a_trend_nor_beyond_a_period() -> None:
    assert estimate(lambda steps: np.full_like(steps, 2.0), 0.0, 0.05) is None
    assert estimate(lambda steps: 2.0 + 1e-3 * steps, 50.0, 0.01) is None
    assert estimate(lambda steps: 4.0 - 2e-3 * steps, 900.0, 0.0) == 2 * HALF
    few = np.arange(5.0)
    assert ahead(few, -few, few + 10.0, -few) is None


def test_a_run_alone_is_measured_where_its_losses_come_to_the_same_level(tmp_path: Path) -> None:
    losses = [4.0 - 1e-3 * step for step in range(2000)]
    steps = np.arange(900, 900 + SMOOTHED, dtype=float)
    newest = 4.0 - 1e-3 * (steps + 300)
    (tmp_path / "alone.json").write_text(json.dumps(losses))
    (tmp_path / "alone.csv").write_text("step,loss\n" + "\n".join(f"{i},{loss}" for i, loss in enumerate(losses)))
    for baseline in (losses, tmp_path / "alone.json", str(tmp_path / "alone.csv")):
        assert Baseline(baseline).saved(steps, newest) == pytest.approx(300, abs=1)
    assert Baseline(losses).saved(steps, newest - 2.0) is None
    assert Baseline(losses).saved(steps[:5], newest[:5]) is None


@pytest.mark.parametrize("baseline", [[], [1.0] * 10, "nowhere.csv", ["a"] * 99])
def test_what_is_no_baseline_is_refused(baseline: object) -> None:
    model = network()
    with pytest.raises(AttachError, match="baseline"):
        Watched(model, torch.optim.SGD(model.parameters(), lr=0.1)).handle.summary(baseline)  # type: ignore[arg-type]


def test_a_training_that_jumps_ahead_says_by_how_much(tmp_path: Path) -> None:
    """The nowcast is where the training alone really came to, 150 steps later."""
    jump, steps = 150, 400
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-2)
    data, losses, states = digits(256), [], []
    for _ in range(steps + jump):
        losses.append(step(model, optimizer, data))
        states.append({name: p.detach().numpy().copy() for name, p in model.named_parameters()})
    (tmp_path / "alone.json").write_text(json.dumps(losses))

    def oracle(history: Sequence[Mapping[str, np.ndarray]], k: int) -> Mapping[str, np.ndarray]:
        return {name: states[200 + jump - 1][name] - old for name, old in history[-1].items()}

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-2)
    watched = Watched(model, optimizer, oracle, period=200, trial=True, patch_bound=1e6)
    data = digits(256)
    for _ in range(steps - 1):
        step(model, optimizer, data, watched.handle)
    assert watched.steps("kept") == [250]
    summary = watched.handle.summary(baseline=tmp_path / "alone.json")
    assert summary["steps_saved"] == pytest.approx(jump, abs=25)
    assert 0.5 * jump < summary["steps_saved_estimate"] < 1.5 * jump
    told = describe(summary)
    assert f"saved {summary['steps_saved']} steps, " in told
    assert f"saved an estimated {summary['steps_saved_estimate']} steps, " in told
